"""Settings shared by all tests: one thread (the machine may be shared; sums come out in one order); Ctrl-C counts."""

import signal

import torch

torch.set_num_threads(1)

# A shell starts its background jobs with Ctrl-C ignored, and they would pass that on to the programs under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
