"""Choices of device, dtype and compilation follow fixed rules, and everything that affects bits is recorded."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.runtime import hardware
from milepost.runtime.hardware import AFFECTS_BITS, DeviceError
from milepost.splitmix import mix

PLAIN = "/var/tmp"  # a folder without a space or a quote, wherever the tests have their files
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def torch_as_before():
    """Puts back what make_deterministic sets for the whole process."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = fill, benchmark


# Devices


def test_every_computer_has_a_cpu_and_it_comes_last():
    assert hardware.available_devices()[-1] == "cpu"
    assert set(hardware.available_devices()) <= {"cuda", "mps", "cpu"}


def test_auto_takes_the_best_available_device():
    assert hardware.choose_device("auto").type == hardware.available_devices()[0]


@pytest.mark.parametrize("requested", hardware.available_devices())
def test_an_available_device_is_taken(requested):
    assert hardware.choose_device(requested) == torch.device(requested)


@pytest.mark.parametrize("requested", sorted({"cuda", "mps", "tpu"} - set(hardware.available_devices())))
def test_an_absent_device_is_refused_with_the_available_ones(requested):
    with pytest.raises(DeviceError) as refusal:
        hardware.choose_device(requested)
    said = str(refusal.value)
    assert f"DEVICE={requested}" in said
    assert f"available: {', '.join(hardware.available_devices())}" in said
    assert "\n" not in said


# Dtypes

AUTO_ON_CPU = [
    *((False, False, width, "float32") for width in (64, 127, 128, 4096)),
    *((amx, avx512, 127, "float32") for amx, avx512 in [(True, False), (False, True), (True, True)]),
    *((amx, avx512, 128, "bfloat16") for amx, avx512 in [(True, False), (False, True), (True, True)]),
]


@pytest.mark.parametrize(("amx", "avx512", "width", "expected"), AUTO_ON_CPU)
def test_auto_dtype_on_a_cpu_is_bfloat16_where_its_hardware_multiplies_that_and_the_model_is_wide(
    amx, avx512, width, expected, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert hardware.choose_dtype("auto", CPU, width=width) == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_dtype_on_cuda_is_bfloat16_where_the_card_has_it(supported, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert hardware.choose_dtype("auto", CUDA, width=8) == expected


def test_auto_dtype_on_mps_is_float32():
    assert hardware.choose_dtype("auto", MPS, width=4096) == "float32"


@pytest.mark.parametrize("device", [CPU, CUDA, MPS], ids=str)
@pytest.mark.parametrize("requested", ["float32", "bfloat16"])
def test_a_requested_dtype_is_taken(requested, device):
    assert hardware.choose_dtype(requested, device, width=4) == requested


def test_float16_is_for_cuda_and_mps():
    assert hardware.choose_dtype("float16", CUDA, width=4) == "float16"
    assert hardware.choose_dtype("float16", MPS, width=4) == "float16"
    with pytest.raises(DeviceError, match=r"DTYPE=float16 .*DTYPE=bfloat16 or DTYPE=float32"):
        hardware.choose_dtype("float16", CPU, width=4)


@pytest.mark.parametrize(("dtype", "product"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast_multiplies_in_its_dtype_and_leaves_the_weights_unchanged(dtype, product):
    layer = torch.nn.Linear(4, 4)
    with hardware.autocast(CPU, dtype):
        assert layer(torch.ones(2, 4)).dtype == product
    assert layer.weight.dtype == torch.float32
    assert layer(torch.ones(2, 4)).dtype == torch.float32


# Compiling

COMPILE = [  # requested, device, model, steps, compiled where there is a compiler
    ("false", CUDA, True, 10**6, False),
    ("auto", CPU, True, 10**6, False),
    ("auto", CUDA, True, 999, False),
    ("auto", CUDA, False, 10**6, False),
    ("auto", CUDA, True, 1000, True),
    ("true", CPU, False, 1, True),
]


@pytest.mark.parametrize(("requested", "device", "pays", "steps", "expected"), COMPILE)
@pytest.mark.parametrize("compiler", [True, False])
def test_compiling_follows_a_fixed_rule(requested, device, pays, steps, expected, compiler, monkeypatch):
    monkeypatch.setattr(hardware, "_has_compiler", lambda device: compiler)
    chosen, remark = hardware.choose_compile(requested, device, pays=pays, steps=steps)
    assert chosen == (expected and compiler)
    assert (remark is not None) == (expected and not compiler)  # an impossible request is logged


@pytest.mark.parametrize("name", ["a folder", "o'hara", 'a"b'])
@pytest.mark.parametrize("whose", ["torch", "temporary files", "cache"])
def test_where_torch_would_not_quote_a_folder_a_cpu_cannot_compile(whose, name, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="plain-", dir=PLAIN) as plain:
        place = Path(plain) / name
        monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
        monkeypatch.setattr(torch, "__path__", ["/plain/torch"])
        monkeypatch.setattr(tempfile, "tempdir", plain)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{plain}/cache")
        assert hardware.choose_compile("true", CPU, pays=True, steps=1) == (True, None)  # the control
        if whose == "torch":
            monkeypatch.setattr(torch, "__path__", [str(place)])
        elif whose == "cache":
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
        else:
            monkeypatch.setattr(tempfile, "tempdir", str(place))
        assert hardware.choose_compile("true", CPU, pays=True, steps=1)[0] is False


# Bits


@pytest.mark.parametrize("on", [True, False])
def test_make_deterministic(on, torch_as_before):
    hardware.make_deterministic(on, CPU)
    assert torch.are_deterministic_algorithms_enabled() == on
    # Flash attention's backward pass on CUDA is deterministic only where other kernels are refused, not warned of.
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.backends.cudnn.benchmark


def reference_splitmix64(state: int) -> int:
    """Steele, Lea and Flood 2014, figure 16, in numpy's wrapping 64-bit arithmetic."""
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int(z ^ (z >> np.uint64(31)))


def test_mix_of_one_number_is_the_published_generators_first():
    assert mix(0) == 0xE220A8397B1DCDAF >> 1  # splitmix64's well-known first output for the seed 0


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_mix_folds_splitmix64_into_a_seed_that_torch_takes(seed, step):
    folded = reference_splitmix64((reference_splitmix64(seed) + step) % 2**64)
    assert mix(seed, step) == folded >> 1
    assert 0 <= mix(seed, step) < 2**63


def test_neighbouring_steps_and_seeds_have_different_seeds():
    seeds = {mix(seed, step) for seed in range(60) for step in range(60)}
    assert len(seeds) == 3600  # (1, 2) and (2, 1) differ too


def test_the_draws_of_a_step_depend_only_on_seed_and_step():
    def draws(seed: int, step: int) -> list[float]:
        hardware.seed_step(torch.device("cpu"), seed, step)
        return torch.rand(8).tolist()

    first = draws(1, 7)
    torch.rand(1000)
    assert draws(1, 7) == first
    assert draws(1, 8) != first
    assert draws(2, 7) != first


def test_processes_draw_differently_and_rank_0_as_a_single_process():
    def draws(**rank: int) -> list[float]:
        hardware.seed_step(torch.device("cpu"), 1, 7, **rank)
        return torch.rand(8).tolist()

    assert draws(rank=0) == draws()
    assert len({tuple(draws(rank=rank)) for rank in range(4)}) == 4


# Fingerprints


def test_the_compilers_options_are_known_to_it():
    """On CUDA it times nothing whose bits differ; a torch that names this otherwise must not pass it over in silence."""
    torch.compile(torch.nn.Linear(2, 2), options=hardware.untimed())
    with pytest.raises(RuntimeError, match="nothing_of_the_kind"):  # the control
        torch.compile(torch.nn.Linear(2, 2), options={"nothing_of_the_kind": True})


def test_on_a_cpu_the_compilers_options_stay_as_they_are(monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: taken.append(options) or model)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    hardware.compiled(torch.nn.Linear(2, 2))
    assert taken == [{"dynamic": False, "options": None}]


def test_what_is_moved_to_the_cpu_is_the_tensor_itself():
    tensor = torch.arange(3)
    assert hardware.moved(tensor, CPU) is tensor


def fingerprint(**changes: object) -> dict[str, object]:
    return hardware.fingerprint(CPU, dtype="float32", compile_step=False, deterministic=True) | changes


def test_a_fingerprint_is_json_and_has_everything_that_affects_bits():
    values = fingerprint()
    assert json.loads(json.dumps(values)) == values
    assert set(AFFECTS_BITS) <= values.keys()
    assert values["device"] == "cpu"
    assert values["threads"] == torch.get_num_threads()
    assert values["torch"] == torch.__version__


def test_the_same_hardware_is_bit_exact():
    assert hardware.bit_changes(fingerprint(), fingerprint()) == []


@pytest.mark.parametrize("name", AFFECTS_BITS)
def test_a_change_that_affects_bits_is_named(name):
    reasons = hardware.bit_changes(fingerprint(**{name: "before"}), fingerprint(**{name: "now"}))
    told = (
        "now processes, was before"
        if name == "processes"
        else f"{hardware.IN_WORDS.get(name, name)} is now, was before"
    )
    assert reasons == [told]


def test_another_number_of_processes_is_one_reason():
    shared = {"processes": 4, "local_processes": 4, "distributed": "ddp"}
    assert hardware.bit_changes(fingerprint(**shared), fingerprint(processes=2, distributed="fsdp")) == [
        "2 processes, was 4"
    ]
    assert hardware.bit_changes(fingerprint(**shared), fingerprint()) == ["1 process, was 4"]
    two_machines = shared | {"local_processes": 2}
    said = ["the number of processes per machine is 2, was 4"]  # sums have another order
    assert hardware.bit_changes(fingerprint(**shared), fingerprint(**two_machines)) == said
    older = {name: value for name, value in fingerprint().items() if name not in shared}  # checkpoints of one process
    assert hardware.bit_changes(older, fingerprint()) == []


@pytest.mark.parametrize("name", ["python", "platform"])
def test_a_change_that_affects_no_bits_is_not_a_reason(name):
    assert hardware.bit_changes(fingerprint(**{name: "before"}), fingerprint()) == []


def test_without_deterministic_kernels_or_on_mps_nothing_is_bit_exact():
    loose = fingerprint(deterministic=False)
    assert hardware.bit_changes(loose, loose) == ["DETERMINISTIC=false"]
    apple = fingerprint(device="mps")
    assert hardware.bit_changes(apple, apple) == ["mps does not promise bit-identical results"]


def test_a_checkpoint_without_a_fingerprint_is_not_bit_exact():
    (reason,) = hardware.bit_changes({}, fingerprint())
    assert reason.endswith("not recorded")
    unsaid = len(AFFECTS_BITS) - 4  # the first versions had one process and the first kernels
    assert len(hardware.bit_changes({"git": "abc"}, fingerprint())) == unsaid + 1


# Memory


def test_free_memory_of_the_cpu_is_what_the_system_reports():
    free = hardware.free_memory(CPU)
    if Path("/proc/meminfo").exists():
        assert free is not None
        assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        assert free is None


def raised_by(allocate) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as error:
        allocate()
    return error.value


def test_failing_allocations_are_recognized_as_out_of_memory():
    assert hardware.is_out_of_memory(raised_by(lambda: torch.empty(2**60, dtype=torch.uint8)))
    assert hardware.is_out_of_memory(raised_by(lambda: np.empty(2**60, dtype=np.uint8)))
    assert hardware.is_out_of_memory(raised_by(lambda: bytearray(2**60)))


OTHERS = [  # messages of other machines
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"), False),
    (ValueError("memory"), False),
    (OSError(28, "No space left on device"), False),
]


@pytest.mark.parametrize(("error", "expected"), OTHERS, ids=lambda value: str(value)[:30])
def test_out_of_memory_is_distinguished_from_other_errors(error, expected):
    assert hardware.is_out_of_memory(error) == expected


@pytest.mark.parametrize(
    ("supported", "capability", "requested", "width", "tokens", "expected"),
    [
        (True, "AVX512", "auto", 768, 300, "bfloat16"),
        (True, "AVX512", "auto", 768, 31, "float32"),
        (True, "AVX512", "auto", 128, 300, "float32"),
        (False, "AVX512", "auto", 768, 300, "float32"),
        (False, "DEFAULT", "auto", 768, 300, "float32"),
        (False, "AVX2", "auto", 768, 300, "bfloat16"),
        (False, "AVX2", "auto", 768, 8, "bfloat16"),
        (False, "AVX2", "auto", 768, 7, "float32"),
        (False, "AVX2", "auto", 128, 300, "float32"),
        (False, "DEFAULT", "bfloat16", 128, 1, "bfloat16"),
        (True, "AVX512", "float32", 768, 300, "float32"),
    ],
)
def test_dtype_for_generation(monkeypatch, supported, capability, requested, width, tokens, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert hardware.decode_dtype(requested, CPU, width=width, tokens=tokens) == expected


# Several processes on a machine


def test_each_process_takes_its_own_gpu_and_several_do_not_take_mps(monkeypatch):
    taken = []
    monkeypatch.setattr(hardware, "available_devices", lambda: ["cuda", "mps", "cpu"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert hardware.choose_device("auto", local_rank=1, local_size=2) == torch.device("cuda", 1)
    assert taken == [1]
    with pytest.raises(DeviceError, match=r"3 processes .* 2 GPUs: set --nproc_per_node"):
        hardware.choose_device("cuda", local_rank=0, local_size=3)
    monkeypatch.setattr(hardware, "available_devices", lambda: ["mps", "cpu"])
    assert hardware.choose_device("auto") == torch.device("mps")
    assert hardware.choose_device("auto", local_rank=1, local_size=2) == torch.device("cpu")
    with pytest.raises(DeviceError, match="no mps device; available: cpu"):
        hardware.choose_device("mps", local_rank=1, local_size=2)


def test_processes_share_the_processors_and_each_has_a_thread(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    try:
        assert [hardware.share_threads(count) for count in (2, 5, 100)] == [6, 2, 1]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
