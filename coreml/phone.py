"""The iPhone at the end of the cable, through coremltools: found, prepared, watched while it works. `latency.py --device iphone`.

coremltools (models/ml_program/experimental/remote_device.py) builds a small app, the model runner, starts it on the phone with
Xcode's devicectl, and exchanges files with it. Two things in its version 9.0 have to be helped:

* it asks for an answer 20 times, twice a second, and gives up; a first load for the neural engine takes minutes. Here it asks on.
* it looks whether the runner lives (`session.is_alive`) without calling the method, so that a phone that is gone would be asked
  on and on. watched() looks by itself.
"""

import asyncio
import math
import re

PULSE, LOOK = 2.0, 30.0  # seconds between two looks at the runner, and at the list of devices
LOCKED = "is locked: unlock it, keep its screen on (Settings, Display, Auto-Lock: Never), and start again."


class LostPhone(Exception):
    """The phone or its runner is gone in the middle: nothing more can be measured, what was measured counts."""


async def find(args):
    """The connected iPhone (--phone chooses among several), with the model runner started on it.

    args: phone, team, bundle, patience. Raises SystemExit with one sentence when there is none, or it cannot be prepared.
    """
    from coremltools.models.ml_program.experimental import remote_device  # complains where there is no Core ML

    remote_device._DeviceCtlRemoteService.__init__.__defaults__ = (0.5, math.ceil(args.patience / 0.5) + 20)  # watched() stops it
    phone = choose(remote_device, args.phone)
    if phone.developer_mode_state == "disabled":
        raise SystemExit(f"{phone.name} is not in developer mode: Settings, Privacy & Security, Developer Mode; then start again.")
    if not args.team:
        raise SystemExit("give --team, the ten letters of your Apple development team: the runner on the phone must be signed.")
    credentials = remote_device.AppSigningCredentials(development_team=args.team, bundle_identifier=args.bundle)
    try:
        ready = await phone.prepare_for_model_debugging(credentials=credentials)
    except Exception as error:
        raise refusal(phone, words(error)) from error
    await asyncio.sleep(PULSE)  # devicectl tells at the end of a launch, not at its beginning, that the phone would not have it
    if not ready.session.is_alive():
        raise refusal(phone, last_words(ready) or "it ended without a word")
    return ready


def choose(remote_device, name):
    """One connected iPhone among the devices that this Mac knows."""
    try:
        devices = remote_device.Device.get_devices()
    except Exception as error:  # no Xcode, or one too old
        raise SystemExit(f"cannot look for an iPhone: {words(error)}. Xcode and its command line tools are needed.") from error
    phones = [device for device in devices if device.type == remote_device.DeviceType.IPHONE]
    named = [phone for phone in phones if name in (None, phone.name, phone.udid, phone.identifier)]
    connected = [phone for phone in named if phone.state == remote_device.DeviceState.CONNECTED]
    if phones and not named:
        raise SystemExit(f"no iPhone is called {name!r}: this Mac knows {listed(phones)}.")
    if named and not connected:
        raise SystemExit(f"{listed(named)}: known, but not connected ({named[0].state.value}). Plug the phone in, unlock it, and "
                         "wait until Xcode's window of devices shows it.")  # fmt: skip
    if not connected:
        raise SystemExit("no iPhone is connected: plug one in, unlock it, trust this Mac, and turn developer mode on.")
    if len(connected) > 1:
        raise SystemExit(f"{len(connected)} iPhones are connected, {listed(connected)}: choose one by --phone NAME.")
    return connected[0]


def refusal(phone, said):
    locked = re.search(r"\b(un)?locked\b|passcode", said, re.IGNORECASE)
    return SystemExit(f"{phone.name} {LOCKED}" if locked else f"the runner could not be started on {phone.name}: {said}")


def listed(phones):
    return ", ".join(phone.name for phone in phones)


def words(error):
    """What an error says, in one line. devicectl's comes as bytes."""
    said = getattr(error, "message", None) or str(error)
    said = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    return " ".join(said.split()).rstrip(".") or type(error).__name__


def last_words(phone):
    """What devicectl printed before the runner ended."""
    pipe = getattr(phone.session._process, "stderr", None)
    said = (pipe.read() or b"") if pipe is not None else b""
    return " ".join((said.decode(errors="replace") if isinstance(said, bytes) else said).split())


def model_of(phone):
    """ "iPhone 16 Pro Max": coremltools keeps the owner's name for the phone, which no report needs, and drops the model's."""
    from coremltools.models.ml_program.experimental import remote_device

    try:
        listing = remote_device._DeviceCtl._run_command("xcrun devicectl list devices")["result"]["devices"]
        hardware = next(d["hardwareProperties"] for d in listing if d.get("identifier") == phone.identifier)
        return hardware.get("marketingName") or hardware["productType"]
    except Exception:  # an Xcode that tells it otherwise
        return "iPhone, model unknown"


def is_there(phone):
    """Whether the list of devices still has the phone as connected. A list that cannot be had says nothing."""
    from coremltools.models.ml_program.experimental import remote_device

    try:
        devices = remote_device.Device.get_devices()
    except Exception:
        return True
    return any(d.identifier == phone.identifier and d.state == remote_device.DeviceState.CONNECTED for d in devices)


async def watched(work, phone, patience):
    """Await `work` on the phone (None: this Mac). Raises LostPhone when the phone goes, TimeoutError after `patience` seconds."""
    loop = asyncio.get_running_loop()
    task, begun, looked = asyncio.ensure_future(work), loop.time(), loop.time()
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=min(PULSE, patience))
            if task.done() or phone is None and loop.time() - begun < patience:
                continue
            if loop.time() - begun >= patience:
                raise TimeoutError
            gone = not phone.session.is_alive()
            if not gone and loop.time() - looked >= LOOK:
                gone, looked = not await loop.run_in_executor(None, is_there, phone), loop.time()
            if gone:
                raise LostPhone("the phone is gone: its cable, its lock, or the runner on it")
        return task.result()
    except (LostPhone, TimeoutError):
        raise
    except Exception as error:  # one operation failed; or everything has, since the phone is not there
        if phone is not None and not (phone.session.is_alive() and is_there(phone)):
            raise LostPhone(f"the phone is gone: {words(error)}") from error
        raise
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
