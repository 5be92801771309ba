import torch

from lora_scripts.training.memory import memory_now, process_memory, reset_peak


def test_process_memory_sees_a_new_block_and_keeps_the_peak():
    before = process_memory()
    block = torch.ones(128 * 2**20, dtype=torch.float32)
    during = process_memory()
    # Pages that earlier tests gave back to the allocator are used again before new ones are asked for.
    assert during.current_bytes - before.current_bytes > 300 * 2**20
    del block
    after = process_memory()
    assert after.peak_bytes >= during.current_bytes * 0.99
    assert after.peak_bytes >= after.current_bytes


def test_reading_on_a_cpu_is_the_process():
    reset_peak(torch.device("cpu"))
    reading = memory_now(torch.device("cpu"))
    assert reading.source == "process"
    assert reading.current_bytes > 50 * 2**20
