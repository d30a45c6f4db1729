"""Wall time of long work, over all sittings: a kill loses a minute of it at most."""

import contextlib
import threading
import time


@contextlib.contextmanager
def counting(record, save):
    """Add the seconds of what is inside to record["seconds"], and call save() every minute and at the end, also after an error.

    Args: record, a dict of an earlier sitting or an empty one; save, writes it where the next sitting finds it.
    """
    before, start, over = record.get("seconds", 0.0), time.time(), threading.Event()

    def note():
        record["seconds"] = round(before + time.time() - start, 1)
        save()

    def every_minute():
        while not over.wait(60):
            note()

    thread = threading.Thread(target=every_minute, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        note()
