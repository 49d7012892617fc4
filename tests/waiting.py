"Waiting for what another process does, with no limit that a slow or busy machine would meet."
import time

HOUR = 3600                                                  # nothing here takes so long, on whatever machine


def wait_for(what, of=None):
    "Until something is so, and then that; the end of the process that is to bring it about (`of`) is an error."
    end = time.time() + HOUR
    while True:
        ended = of is not None and of.poll() is not None     # asked first: its last act may be what is waited for
        if got := what(): return got
        assert not ended, getattr(of, 'err', 'the other process ended before')
        assert time.time() < end, 'the other process did not come that far'
        time.sleep(.01)
