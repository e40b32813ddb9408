"""LoRAs in fp8, and exact ones in int8: their numbers against float64 by hand, and how other programs read them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_dpo.errors import BadFileError, SettingError
from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.keymap import UNET, unet_to_diffusers
from lib_dpo.families.model import open_model
from lib_dpo.families.shapes import small, unet_diffusers_config
from lib_dpo.families.synthetic import small_pair
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.maths import precision
from lib_dpo.maths.fp8 import Extent, factor_scale, refitted_up
from lib_dpo.maths.int8 import quantised
from lib_dpo.maths.lowrank import factorise
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.offset import open_pair
from lib_dpo.operations import forms
from lib_dpo.operations import resize as resize_module
from lib_dpo.operations.bake import bake
from lib_dpo.operations.extract import ExtractReport, extract
from lib_dpo.operations.inspect import inspect
from lib_dpo.operations.resize import resize
from lib_dpo.operations.verify import verify
from lib_dpo.operations.write_offset import write_offset
from lib_dpo.settings import ExtractSettings, RankPolicy

Files = tuple[Path, Path]
E4M3_NORMAL, E4M3_LARGEST, FP16_LARGEST = 2.0**-6, 448.0, 65504.0


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return small_pair(tmp_path_factory.mktemp("sd1"), "sd1")


def run(files: Files, output: Path, **settings: Any) -> ExtractReport:
    policy = {name: settings.pop(name) for name in ("rank", "energy", "size_mb") if name in settings}
    with open_model(files[0]) as base, open_model(files[1]) as tuned:
        return extract(open_pair(base, tuned), output, ExtractSettings(RankPolicy(**policy), device="cpu", **settings))


def deltas(files: Files) -> dict[str, Tensor]:
    """Tuned minus base of the UNet in float64, by the module's name in a LoRA and `weight` or `bias`."""
    base, tuned = load_file(files[0]), load_file(files[1])
    found = {}
    for key in base:
        name = unet_to_diffusers(ARCHITECTURES["sd1"], key)
        if name:
            module, _, kind = name.rpartition(".")
            module = {"conv_norm_out": "out_0"}.get(module, module.replace(".", "_"))  # as WebUIs want it
            found[f"lora_unet_{module}.{kind}"] = tuned[name].double() - base[key].double().reshape(tuned[name].shape)
    return found


def as_others_read(lora: dict[str, Tensor], module: str, shape: torch.Size) -> Tensor | None:
    """The change of a module in float64 by LyCORIS' definitions, alpha / rank and kron(w1, w2)."""
    parts = {key.removeprefix(module + "."): tensor for key, tensor in lora.items() if key.startswith(module + ".")}
    if "lora_up.weight" in parts:
        up, down = (parts[f"lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
        return (up @ down * (float(parts["alpha"]) / up.shape[1])).reshape(shape)
    if "lokr_w2" in parts:
        return torch.kron(parts["lokr_w1"].double(), parts["lokr_w2"].double().flatten(1)).reshape(shape)
    whole = parts.get("diff", parts.get("w_norm"))
    return None if whole is None else whole.double().reshape(shape)


def kept_by_hand(files: Files, lora: dict[str, Tensor]) -> float:
    missed = total = 0.0
    for name, delta in deltas(files).items():
        module, _, kind = name.rpartition(".")
        total += float(delta.square().sum())
        found = (
            as_others_read(lora, module, delta.shape)
            if kind == "weight"
            else lora.get(f"{module}.b_norm", lora.get(f"{module}.diff_b"))
        )
        missed += float((delta - (0 if found is None else found.double().reshape(delta.shape))).square().sum())
    return 1 - missed / total


# ---- fp8 ----


@pytest.mark.parametrize("policy", [{"rank": 6}, {"energy": 0.5}, {"size_mb": 0.7}, {"rank": 8, "profile": "webui"}], ids=str)
def test_what_an_fp8_file_keeps_is_that_of_float64_by_hand(sd1: Files, tmp_path: Path, policy: dict[str, Any]) -> None:
    report = run(sd1, tmp_path / "l.safetensors", precision="fp8", **policy)
    lora = load_file(tmp_path / "l.safetensors")
    assert report.tally.total.energy_kept == pytest.approx(kept_by_hand(sd1, lora), abs=2e-6)
    dtypes = {key.partition(".")[2]: tensor.dtype for key, tensor in lora.items()}
    assert {dtypes.pop(name, torch.float16) for name in ("w_norm", "b_norm")} == {torch.float16}
    assert dtypes == {
        "alpha": torch.float32,
        "lora_up.weight": torch.float8_e4m3fn,
        "lora_down.weight": torch.float8_e4m3fn,
    }


@pytest.mark.parametrize("policy", [{"rank": 6}, {"energy": 0.5}], ids=str)
def test_fp8_takes_little_from_the_energy_and_half_from_the_file(sd1: Files, tmp_path: Path, policy: dict[str, Any]) -> None:
    whole = run(sd1, tmp_path / "fp16.safetensors", **policy)
    half = run(sd1, tmp_path / "fp8.safetensors", precision="fp8", **policy)
    assert half.tally.total.energy_kept > 0.9985 * whole.tally.total.energy_kept
    if "energy" in policy:
        assert half.tally.total.energy_kept >= 0.5
    numbers = [
        sum(t.nbytes for k, t in load_file(tmp_path / f"{name}.safetensors").items() if ".lora_" in k)
        for name in ("fp16", "fp8")
    ]
    assert numbers[1] < 0.52 * numbers[0]


def test_the_size_policy_counts_one_byte_for_each_number(sd1: Files, tmp_path: Path) -> None:
    fp16 = run(sd1, tmp_path / "fp16.safetensors", size_mb=0.8)
    fp8 = run(sd1, tmp_path / "fp8.safetensors", size_mb=0.8, precision="fp8")
    assert 0.75e6 < fp8.file_bytes <= 0.8e6
    assert fp8.tally.total.energy_kept > 1.35 * fp16.tally.total.energy_kept


def test_factors_are_normal_numbers_and_their_products_fit_into_fp16(sd1: Files, tmp_path: Path) -> None:
    run(sd1, tmp_path / "l.safetensors", rank=6, precision="fp8")
    lora = load_file(tmp_path / "l.safetensors")
    for key in lora:
        if key.endswith(".lora_up.weight"):
            up, down = lora[key].float().flatten(1), lora[key.replace("lora_up", "lora_down")].float().flatten(1)
            for components in (up.T, down):  # of each component by itself
                assert float(components.square().mean(1).sqrt().min()) > E4M3_NORMAL
            assert float(torch.maximum(up.abs().max(), down.abs().max())) <= E4M3_LARGEST
            assert float((up @ down).abs().max()) < FP16_LARGEST / 16
            product = (up.half().float() @ down.half().float()).half().double()  # old torch multiplies no halves on a CPU
            torch.testing.assert_close(product, up.double() @ down.double(), rtol=2e-3, atol=2e-3)


def test_programs_that_take_the_commonest_alpha_read_the_same(sd1: Files, tmp_path: Path) -> None:
    for policy in ({"rank": 6}, {"energy": 0.5}):
        run(sd1, tmp_path / "l.safetensors", precision="fp8", **policy)
        alphas = {key: float(tensor) for key, tensor in load_file(tmp_path / "l.safetensors").items() if key.endswith("alpha")}
        attention = {alpha for key, alpha in alphas.items() if "attn" in key}
        values = list(alphas.values())
        assert attention == {max(set(values), key=values.count)}
        (tmp_path / "l.safetensors").unlink()


@pytest.mark.parametrize("size", [1e-7, 1e-4, 3.0])
def test_every_tensor_begins_where_its_items_may(tmp_path: Path, size: float) -> None:
    files = small_pair(tmp_path / "pair", "sd1", offset_rms=size)
    report = run(files, tmp_path / "l.safetensors", rank=5, precision="fp8", profile="webui")
    assert report.tally.total.energy_kept == pytest.approx(kept_by_hand(files, load_file(tmp_path / "l.safetensors")), abs=2e-6)
    with open_checkpoint(tmp_path / "l.safetensors") as lora:
        position = 0
        for info in lora.infos.values():
            assert position % (info.nbytes // math.prod(info.shape)) == 0
            position += info.nbytes


def test_one_scale_serves_layers_of_different_sizes() -> None:
    even = factor_scale([Extent(1.0, 1280, 1280), Extent(0.5, 320, 2880)])
    assert math.log2(even) == round(math.log2(even))
    assert factor_scale([Extent(2.0**20, 1280, 1280), Extent(2.0**19, 320, 2880)]) == even * 2**20
    assert factor_scale([Extent(1.0, 1280, 1280), Extent(0.5, 320, 2880), Extent(1e-9, 320, 320)]) == even  # has no say
    assert factor_scale([Extent(1e4, 640, 640), Extent(10.0, 640, 640)]) * 2**15.5 >= 1e4  # no product leaves fp16
    assert factor_scale([]) == factor_scale([Extent(0.0, 3, 3)]) == 1.0


def test_fitting_up_to_the_rounded_down_wins_energy_back() -> None:
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(96, 160, generator=generator)
    up, down, _ = factorise(A, 32, method="exact")
    rounded = down.to(torch.float8_e4m3fn)

    def missed(left: Tensor) -> float:
        return float((A - 0.5 * left.to(torch.float8_e4m3fn).float() @ rounded.float()).square().sum())

    fitted = refitted_up(A, rounded, 0.5)
    expected = torch.linalg.lstsq(rounded.double().T, A.double().T / 0.5).solution.T
    torch.testing.assert_close(fitted.double(), expected, rtol=1e-4, atol=1e-5)
    assert missed(fitted) < missed(up / 0.5)


def test_fp8_is_refused_where_torch_lacks_it(sd1: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "PRECISION", {"fp16": torch.float16})
    with pytest.raises(SettingError, match=r"precision fp8 needs torch 2\.1 or later, this is .*; choose fp16"):
        run(sd1, tmp_path / "l.safetensors", precision="fp8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", ["fp16", "fp8"])
def test_a_resized_lora_in_fp8_keeps_its_meaning(sd1: Files, tmp_path: Path, before: str) -> None:
    run(sd1, tmp_path / "l.safetensors", rank=8, precision=before)
    with open_checkpoint(tmp_path / "l.safetensors") as lora:
        report = resize(lora, tmp_path / "small.safetensors", RankPolicy(rank=4), precision="fp8")
    old, new = load_file(tmp_path / "l.safetensors"), load_file(tmp_path / "small.safetensors")
    assert {tensor.dtype for key, tensor in new.items() if ".lora_" in key} == {torch.float8_e4m3fn}
    missed = total = 0.0
    for name, delta in deltas(sd1).items():
        if not name.endswith("weight"):
            continue
        was, now = (as_others_read(file, name.rpartition(".")[0], delta.shape) for file in (old, new))
        if was is not None and now is not None:
            total += float(was.square().sum())
            missed += float((was - now).square().sum())
    assert report.energy_kept == pytest.approx(1 - missed / total, abs=1e-6)


def test_a_resized_lora_beyond_fp8_is_refused(sd1: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(sd1, tmp_path / "l.safetensors", rank=8)
    monkeypatch.setattr(resize_module, "factor_scale", lambda extents: 1e-30)
    with (
        open_checkpoint(tmp_path / "l.safetensors") as lora,
        pytest.raises(SettingError, match="does not fit into"),
    ):
        resize(lora, tmp_path / "small.safetensors", RankPolicy(rank=8), precision="fp8")
    assert not (tmp_path / "small.safetensors").exists()


# ---- exact ----


def test_an_exact_lora_holds_the_change_a_byte_for_each_weight(sd1: Files, tmp_path: Path) -> None:
    report = run(sd1, tmp_path / "l.safetensors", form="exact")
    lora = load_file(tmp_path / "l.safetensors")
    kept = kept_by_hand(sd1, lora)
    assert report.tally.total.energy_kept == pytest.approx(kept, abs=2e-6)
    assert kept > 0.9998
    weights = {name: delta for name, delta in deltas(sd1).items() if name.endswith("weight") and delta.ndim > 1}
    missed = sum(
        float((delta - as_others_read(lora, name.rpartition(".")[0], delta.shape)).square().sum())  # type: ignore[operator]
        for name, delta in weights.items()
    )
    assert 1 - missed / sum(float(delta.square().sum()) for delta in weights.values()) > 0.9998
    numel = sum(delta.numel() for name, delta in weights.items() if "conv_in" not in name)
    assert sum(lora[key].nbytes for key in lora if key.endswith("lokr_w2")) == numel
    first = weights.pop("lora_unet_conv_in.weight")  # its own test is below
    assert lora["lora_unet_conv_in.diff"].shape == first.shape
    for name, delta in weights.items():
        module = name.rpartition(".")[0]
        assert lora[f"{module}.lokr_w2"].shape == delta.shape
        assert lora[f"{module}.lokr_w1"].shape == (1, 1)
        assert lora[f"{module}.lokr_w1"].dtype == torch.float32
        assert f"{module}.alpha" not in lora
    assert (report.form, report.precision, report.policy, report.wider) == ("exact", "int8", "exact", 0)


@pytest.mark.parametrize("size", [0.01, 1.0])
def test_a_layer_with_outliers_is_written_in_more_bytes(tmp_path: Path, size: float) -> None:
    files = small_pair(tmp_path / "pair", "sd1")
    tensors = load_file(files[1])
    tensors["mid_block.resnets.0.conv1.weight"].view(-1)[7] += size
    save_file(tensors, files[1])
    report = run(files, tmp_path / "l.safetensors", form="exact")
    lora = load_file(tmp_path / "l.safetensors")
    delta, found = (
        each[f"lora_unet_mid_block_resnets_0_conv1.{part}"] for each, part in ((deltas(files), "weight"), (lora, "diff"))
    )
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), delta, rtol=2**-10, atol=1e-7)
    assert report.wider == 1
    assert report.tally.total.energy_kept == pytest.approx(kept_by_hand(files, lora), abs=2e-6)


def test_layers_that_need_float32_keep_their_own_numbers(tmp_path: Path) -> None:
    """Changes too small for fp16 beside outliers: what is written must not be the memory that the next layer is read into."""
    files = small_pair(tmp_path / "pair", "sd1", offset_rms=0)
    base, tuned = load_file(files[0]), load_file(files[1])
    names = [key for key in base if key.endswith(("to_q.weight", "to_out.0.weight")) and key.startswith(UNET)]
    generator = torch.Generator().manual_seed(5)
    for key in names:
        base[key] = torch.zeros_like(base[key], dtype=torch.float32)
        delta = torch.randn(base[key].shape, generator=generator) * 1e-8
        delta.view(-1)[3] = 1e-3
        tuned[unet_to_diffusers(ARCHITECTURES["sd1"], key) or ""] = delta
    save_file(base, files[0])
    save_file(tuned, files[1])
    report = run(files, tmp_path / "l.safetensors", form="exact")
    lora = load_file(tmp_path / "l.safetensors")
    assert 20 < report.wider <= len(names)
    exact = 0
    for name, delta in deltas(files).items():
        found = lora.get(name.replace(".weight", ".diff"))
        if found is not None and found.dtype == torch.float32:
            exact += 1
            torch.testing.assert_close(found.double(), delta, rtol=0, atol=0)
    assert exact > 20


def test_the_first_convolution_is_a_difference_that_hosts_widen_for_inpainting(sd1: Files, tmp_path: Path) -> None:
    """AUTOMATIC1111 pads a `diff` to nine channels and cannot reshape a LoKr; so does our own reader."""
    report = run(sd1, tmp_path / "l.safetensors", form="exact")
    found = load_file(tmp_path / "l.safetensors")["lora_unet_conv_in.diff"]
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), deltas(sd1)["lora_unet_conv_in.weight"], rtol=2**-10, atol=1e-7)
    assert report.wider == 0  # it is no layer that int8 did not do for
    tensors = load_file(sd1[0])
    key = f"{UNET}input_blocks.0.0.weight"
    tensors[key] = torch.cat((tensors[key], torch.ones_like(tensors[key]), torch.ones_like(tensors[key][:, :1])), dim=1)
    save_file(tensors, tmp_path / "inpainting.safetensors")
    with open_model(tmp_path / "inpainting.safetensors") as target, open_offset(tmp_path / "l.safetensors") as offset:
        bake(target, offset, tmp_path / "baked.safetensors")
    baked = load_file(tmp_path / "baked.safetensors")[key].double()
    torch.testing.assert_close(baked[:, :4], tensors[key][:, :4].double() + found.double(), rtol=1e-3, atol=1e-6)
    assert torch.equal(baked[:, 4:], tensors[key][:, 4:].double())


def test_out_of_memory_on_a_device_goes_on_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    class Elsewhere:
        """A delta on a device that has no room."""

        device = torch.device("cuda")

        def cpu(self) -> Tensor:
            return torch.zeros(2, 2)

    def nearest(layer: Any, delta: Any, row: Any) -> dict[str, Tensor]:
        tried.append(delta.device.type)
        if delta.device.type == "cuda":
            raise RuntimeError("CUDA out of memory")
        return {}

    monkeypatch.setattr(forms, "_nearest", nearest)
    monkeypatch.setattr(forms, "release", lambda device: None)
    exact = object.__new__(forms.Exact)
    assert exact._quantised(None, Elsewhere(), None) == {}  # type: ignore[arg-type]  # neither is looked at
    assert tried == ["cuda", "cpu"]
    monkeypatch.setattr(forms, "is_out_of_memory", lambda error: False)
    with pytest.raises(RuntimeError):
        exact._quantised(None, Elsewhere(), None)  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize("policy", [{"size_mb": 0.6}, {"energy": 0.4}])
def test_no_number_and_no_product_leaves_its_format_where_layers_differ_a_thousandfold(
    tmp_path: Path, policy: dict[str, Any]
) -> None:
    """One alpha serves layers of different ranks: the strong ones have the most components and the smallest scale then."""
    files = small_pair(tmp_path / "pair", "sd1")
    base, tuned = load_file(files[0]), load_file(files[1])
    for key in base:
        name = unet_to_diffusers(ARCHITECTURES["sd1"], key)
        if name and name.endswith("attn1.to_q.weight"):
            start = base[key].reshape(tuned[name].shape).to(tuned[name])
            tuned[name] = start + 1000 * (tuned[name] - start)
    save_file(tuned, files[1])
    run(files, tmp_path / "l.safetensors", precision="fp8", **policy)
    lora = load_file(tmp_path / "l.safetensors")
    ups = [key for key in lora if key.endswith(".lora_up.weight")]
    assert len({lora[key].shape[1] for key in ups}) > 2
    for key in ups:
        up, down = lora[key].float().flatten(1), lora[key.replace("lora_up", "lora_down")].float().flatten(1)
        assert float(torch.maximum(up.abs().max(), down.abs().max())) < E4M3_LARGEST
        assert float((up @ down).norm()) <= 2**15.1  # of which no entry is more


def test_a_layer_beyond_fp8_is_refused_and_nothing_is_written(
    sd1: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "factor_scale", lambda extents: 1e-30)
    with pytest.raises(SettingError, match="does not fit into fp8; choose the precision fp32"):
        run(sd1, tmp_path / "l.safetensors", rank=2, precision="fp8")
    assert not list(tmp_path.iterdir())


def test_values_in_int8_are_the_nearest_of_the_best_scale() -> None:
    delta = torch.randn(320, 288, generator=torch.Generator().manual_seed(1)) * 1e-4
    values, scale = quantised(delta)
    missed = float((delta.double() - values.double() * scale).square().sum() / delta.double().square().sum())
    assert values.dtype == torch.int8
    assert missed < 1.4e-4
    step = float(delta.abs().max()) / 127
    plain = (delta / step).round() * step
    assert missed <= float((delta.double() - plain.double()).square().sum() / delta.double().square().sum())
    zeros, one = quantised(torch.zeros(3, 4))
    assert not zeros.any()
    assert one == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 8}, "leave out rank"),
        ({"energy": 0.5}, "leave out rank"),
        ({"precision": "fp8"}, "int8; leave out fp8"),
        ({"profile": "full"}, "leave out method, profile and seed"),
        ({"method": "exact"}, "leave out method, profile and seed"),
        ({"form": "exat"}, "form 'exat' is unknown.*did you mean exact"),
    ],
)
def test_an_exact_lora_has_no_rank_and_no_other_precision(settings: dict[str, Any], message: str) -> None:
    policy = {name: settings.pop(name) for name in ("rank", "energy") if name in settings}
    with pytest.raises(SettingError, match=message):
        ExtractSettings(RankPolicy(**policy), **{"form": "exact", **settings})


def test_an_exact_lora_is_read_back_as_what_it_says_it_keeps(sd1: Files, tmp_path: Path) -> None:
    report = run(sd1, tmp_path / "l.safetensors", form="exact")
    with open_offset(tmp_path / "l.safetensors") as offset, open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        found = verify(offset, open_pair(base, tuned))
        assert not offset.unmatched
    assert found.tally.total.energy_kept == pytest.approx(report.tally.total.energy_kept, abs=1e-7)
    assert found.claimed == report.tally.total.energy_kept


def test_baking_it_gives_nearly_always_the_weights_of_an_offset_file(sd1: Files, tmp_path: Path) -> None:
    """Within one step of fp16, but for weights near 0, where these steps are finer than those of int8."""
    run(sd1, tmp_path / "l.safetensors", form="exact")
    with open_model(sd1[0]) as base, open_model(sd1[1]) as tuned:
        write_offset(open_pair(base, tuned), tmp_path / "o.safetensors")
    for name in ("l", "o"):
        with open_model(sd1[0]) as target, open_offset(tmp_path / f"{name}.safetensors") as offset:
            bake(target, offset, tmp_path / f"{name}-baked.safetensors", strength=1.0)
    one, other = load_file(tmp_path / "l-baked.safetensors"), load_file(tmp_path / "o-baked.safetensors")
    near = far = total = changed = 0
    for key, weight in load_file(sd1[0]).items():
        if key.startswith(UNET):
            steps = (one[key].view(torch.int16).int() - other[key].view(torch.int16).int()).abs()
            typical = weight.float().square().mean().sqrt()
            large = weight.float().abs() > 0.1 * typical
            near += int((steps <= 1).sum())
            far += int((steps[large] > 1).sum())
            changed += int((one[key] != weight).sum())
            total += weight.numel()
    assert near >= 0.975 * total
    assert far < 0.001 * total
    assert changed > 0.9 * total


def test_inspect_says_who_reads_it(sd1: Files, tmp_path: Path) -> None:
    run(sd1, tmp_path / "l.safetensors", form="exact")
    found = inspect(tmp_path / "l.safetensors")
    assert (found.kind, found.architecture, found.dtypes["I8"] > 200) == ("lora", "sd1", True)
    assert any("diffusers refuses the file" in note for note in found.notes)


@pytest.mark.newest
def test_diffusers_refuses_it_rather_than_misreading_it(sd1: Files, tmp_path: Path) -> None:
    import diffusers
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    run(sd1, tmp_path / "l.safetensors", form="exact")
    unet = diffusers.UNet2DConditionModel(
        **{key: value for key, value in unet_diffusers_config("sd1", small("sd1")).items() if key[0] != "_"}
    )
    with pytest.raises(ValueError, match="not been correctly renamed"):
        StableDiffusionLoraLoaderMixin.lora_state_dict(load_file(tmp_path / "l.safetensors"), unet_config=unet.config)


def test_a_truncated_exact_lora_is_refused(sd1: Files, tmp_path: Path) -> None:
    run(sd1, tmp_path / "l.safetensors", form="exact")
    content = (tmp_path / "l.safetensors").read_bytes()
    (tmp_path / "l.safetensors").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(BadFileError, match=r"it has \d+ bytes, expected \d+ by its header"):
        open_offset(tmp_path / "l.safetensors")
