"""Where the time of a call goes, kernel by kernel, and what it takes at least."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity

from backends.triton_gpu import select
from tools.gpu.candidates import architecture
from tools.gpu.problems import Problem, Product
from tools.gpu.report import Profile
from tools.gpu.targets import OURS
from tools.gpu.timing import Ceilings


def profile(problem: Problem, calls: Sequence[Product], ceilings: Ceilings) -> Profile:
    """Of our operator, launched call by call; `calls` have copies of the weight, as when they are timed."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        for call in calls:
            call()
        torch.cuda.synchronize()
    kernels = {each.key: each.self_device_time_total / len(calls) for each in found.key_averages() if each.self_device_time_total > 0}
    return Profile(problem.key(OURS), kernels, least(problem, ceilings, architecture()))


def least(problem: Problem, ceilings: Ceilings, arch: int) -> Mapping[str, float]:
    """Microseconds that memory and tensor cores need, at the ceilings measured, and instructions, as the model has counted them."""
    operations = 2 * problem.M * problem.K * problem.N / (2 if problem.case.int8 else 1)  # products of int8 take half the time
    found = {"memory": 1e6 * problem.moved / ceilings.copy, "products": 1e6 * operations / ceilings.product}
    if problem.case.int8:
        return found
    bits, shape = problem.format.bits, (problem.M, problem.N, problem.K)
    config = select.choose("packed_linear", bits, *shape, problem.case.group, arch)
    counted = [form.per_weight for form in select.forms(arch, bits) if replace(form.config, split=config.split) == config]
    if counted:
        weights = problem.N * problem.K * math.ceil(problem.M / config.tile_m)
        found["instructions"] = counted[0] * weights / select.DEVICES[arch].issued_per_us
    return found
