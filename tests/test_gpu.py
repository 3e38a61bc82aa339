"""Delta weights on a CUDA device: the same as on the CPU up to the order of float32 sums."""

import pytest
import torch

from adaptertools.adapter import Kind, LoraModule, RowSlice, Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MODULES = {
    "linear": LoraModule(target=Target(parameter="q"), lora_A=random(8, 512), lora_B=random(256, 8), alpha=16.0),
    "half precision": LoraModule(
        target=Target(parameter="q"), lora_A=random(8, 512).bfloat16(), lora_B=random(256, 8).bfloat16(), alpha=16.0
    ),
    "fused rows": LoraModule(
        target=Target(parameter="c_attn", rows=RowSlice(start=0, stop=64, total=192)),
        lora_A=random(4, 64),
        lora_B=random(64, 4),
        alpha=8.0,
        transposed=True,
    ),
    "experts": LoraModule(
        target=Target(parameter="experts.gate_up_proj"),
        kind=Kind.PARAMETER,
        lora_A=random(4, 2, 64),
        lora_B=random(4, 32, 2),
        alpha=4.0,
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_delta_weight_on_the_gpu_is_that_of_the_cpu(name: str) -> None:
    module = MODULES[name]
    there = module.delta_weight(device="cuda")
    assert there.device.type == "cuda"
    reference = module.delta_weight(dtype=torch.float64)
    assert torch.allclose(there.cpu().double(), reference, rtol=0, atol=1e-5 * float(reference.abs().max()))


def test_float32_delta_weights_are_not_computed_in_tf32() -> None:
    module = LoraModule(target=Target(parameter="q"), lora_A=random(64, 1024), lora_B=random(512, 64), alpha=64.0)
    reference = module.delta_weight(dtype=torch.float64)
    error = (module.delta_weight(device="cuda").cpu().double() - reference).norm() / reference.norm()
    assert error < 1e-6
