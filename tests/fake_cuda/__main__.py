"""What the pretended device says of a blocking copy, a read, a copy to the host, a copy, and two devices in one sum."""

from tests.fake_cuda.launch import start_again

start_again()

import torch  # noqa: E402

from tests.fake_cuda.device import FakeCuda, pretend  # noqa: E402

pretend()
with FakeCuda() as device:
    there, here = torch.zeros(2, device="cuda"), torch.zeros(2)
    for act in (
        lambda: here.to("cuda"), lambda: bool(there[0]), lambda: there.cpu(), lambda: here.to("cuda", non_blocking=True)
    ):  # fmt: skip
        device.clear()
        act()
        print(*(what for what, _ in device.seen))
    try:
        print(there + here)
    except RuntimeError:
        print("mixed")
