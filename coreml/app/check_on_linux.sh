#!/usr/bin/env bash
# Builds and tests coreml/app on Linux, with Debian 13's Swift in a tree of its own outside the repository.
#
#     sudo coreml/app/check_on_linux.sh [TREE]      # default: /var/tmp/snapgen-swift; 3 GB, some minutes, kept for the next time
#
# Needs root and debootstrap (apt-get install debootstrap). What is behind `#if canImport(CoreML)` and SwiftUI is not compiled here:
# .github/workflows/app.yml does that on a Mac.
set -euo pipefail

tree=${1:-/var/tmp/snapgen-swift}
root=$(cd "$(dirname "$0")/../.." && pwd)

if [ "$(id -u)" != 0 ] || ! command -v debootstrap > /dev/null; then
    echo "check_on_linux.sh needs root, and debootstrap: apt-get install debootstrap, then sudo $0" >&2
    exit 1
fi
if [ ! -e "$tree/.ready" ]; then
    # The headers of the C and C++ libraries, without which nothing links, swiftlang does not ask for.
    debootstrap --variant=minbase --include=swiftlang,libc6-dev,libstdc++-14-dev trixie "$tree" http://deb.debian.org/debian
    echo /usr/libexec/swift/lib/swift/linux > "$tree/etc/ld.so.conf.d/swift.conf"
    chroot "$tree" ldconfig
    touch "$tree/.ready"
fi

rm -rf "$tree/work"
mkdir -p "$tree/work/assets/toy-sd3" "$tree/work/coreml"
cp -r "$root/coreml/app" "$tree/work/coreml/"
rm -rf "$tree/work/coreml/app/.build"
cp -r "$root"/assets/toy-sd3/tokenizer* "$tree/work/assets/toy-sd3/"
export tree HOME=/root PATH="/usr/libexec/swift/bin:$PATH"
unshare --mount --fork bash -ec '  # Swift needs /proc; in a namespace of its own the mount ends with the script
    mount -t proc proc "$tree/proc"
    exec chroot "$tree" bash -ec "cd /work/coreml/app; swift --version; swift test"'
