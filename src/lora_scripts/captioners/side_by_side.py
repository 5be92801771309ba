"""Pictures side by side on a CPU: each core takes its own, instead of all cores sharing every operation.

Where all cores share an operation they wait for each other at its end, and thousands of operations a picture are short; a thread that
prepares the next pictures then holds up all of them. Measured with BLIP large on two cores, in turns: 2.4 % less time in float32 (1 to 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["side_by_side"]


def side_by_side(run: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """`run` of each part, without gradients, by as many threads as torch has, each of which computes on one core.

    An interruption waits for the parts that are being computed and leaves out the others.
    """
    num_threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def alone(part: Tensor) -> Tensor:
        torch.get_num_threads()  # its first call in a thread takes over the process's number, which would undo the next line
        torch.set_num_threads(1)
        with torch.inference_mode(inference), torch.no_grad():  # modes are those of a thread
            return run(part)

    try:
        with ThreadPoolExecutor(num_threads, thread_name_prefix="encoder") as pool:
            return list(pool.map(alone, parts))
    finally:
        torch.set_num_threads(num_threads)  # the process's number, and that of what follows in this thread
