"""Where the time of a call goes, kernel by kernel, and what it takes at least."""

from collections.abc import Mapping, Sequence

import torch
from torch.profiler import ProfilerActivity

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
    return Profile(problem.key(OURS), kernels, least(problem, ceilings))


def least(problem: Problem, ceilings: Ceilings) -> Mapping[str, float]:
    """Microseconds that memory and tensor cores need, at the ceilings measured."""
    operations = 2 * problem.M * problem.K * problem.N
    return {"memory": 1e6 * problem.moved / ceilings.copy, "products": 1e6 * operations / ceilings.product}
