"""Adapters that nobody should write: by hand and by chance, each loads as it says it is or is refused.

python -m tests.torture.adapters --fuzzed 2000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .folders import CONFIG, WEIGHTS, legal, outcome, pack, settings, unpack, write

Make = Callable[[Path], None]
CASES: dict[str, tuple[Make, str]] = {}
OUTCOMES = ("loaded", "refused", "peft's")
LAYER = "base_model.model.0"


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def case(name: str, words: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        CASES[name] = (make, words)
        return make

    return register


def config_case(name: str, words: str, *, without: str | None = None, **changes: Any) -> None:
    found = {**settings(), **changes}
    found.pop(without, None)
    raw_case(name, words, json.dumps(found).encode())


def raw_case(name: str, words: str, config: bytes) -> None:
    CASES[name] = (lambda folder: write(folder, config, legal()[1]), words)


def header_case(name: str, words: str, change: Callable[[dict[str, Any]], None]) -> None:
    def make(folder: Path) -> None:
        header, body = unpack(legal()[1])
        change(header)
        write(folder, legal()[0], pack(header, body))

    CASES[name] = (make, words)


def weights_case(name: str, words: str, change: Callable[[bytes], bytes]) -> None:
    CASES[name] = (lambda folder: write(folder, legal()[0], change(legal()[1])), words)


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[new] = header.pop(old)

    return change


def entry(key: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[key].update(values)


def fill(key: str, number: float) -> Callable[[bytes], bytes]:
    """Put a number into the first place of a tensor."""

    def change(weights: bytes) -> bytes:
        header, body = unpack(weights)
        start = header[key]["data_offsets"][0]
        return pack(header, body[:start] + struct.pack("<f", number) + body[start + 4 :])

    return change


for option in ("r", "num_knots", "layer_replication"):
    value: Any = [[0, 10**9]] if option == "layer_replication" else 10**9
    config_case(f"{option} of a billion", f"{CONFIG}: {option} must .* at most", **{option: value})
config_case("a legal r that the tensors have not", "must have the shape .60000, any., got .2, 4", r=60000)
config_case("a legal number of knots that the tensors have not", "must have the shape .4000., got .5,", num_knots=4000)
config_case("a rank of one layer that its tensors have not", "must have the shape .3, any.", rank_pattern={"0": 3})
for option in ("k_min", "k_max", "soft_temperature", "lora_alpha", "lora_dropout", "spline_reg_weight"):
    config_case(f"{option} is NaN", "numbers must be finite, got NaN", **{option: float("nan")})
    config_case(f"{option} is infinite", "numbers must be finite, got Infinity", **{option: float("inf")})
raw_case(
    "k_max of 1e999", "numbers must be finite, got '1e999'", legal()[0].replace(b'"k_max": 3.0', b'"k_max": 1e999')
)
config_case("k_max of 400 digits", "k_max must be within ±1e\\+30", k_max=10**400)
config_case("a range that fp32 cannot tell", "so far apart that fp32 can tell 5 knots", k_min=1.0, k_max=1.0 + 1e-9)
config_case("a temperature whose square is 0", "soft_temperature must be within", soft_temperature=1e-200)
config_case("a negative rank", "r must be at least 1, got -2", r=-2)
config_case("r as a text", "r must be int, got '2'", r="2")
config_case("r as a fraction", "r must be int, got 2.0", r=2.0)
config_case("learn_scales as a number", "learn_scales must be bool, got 1", learn_scales=1)
config_case("target_modules as a number", "target_modules must be list", target_modules=7)
config_case("target_modules of lists", "target_modules must be list", target_modules=[["0"]])
config_case("rank_pattern as null", "rank_pattern must be a dict", rank_pattern=None)
config_case("rank_pattern with a text", "rank_pattern must be an int, got '2'", rank_pattern={"0": "2"})
config_case("an unknown key", "every key must be a setting of LSLoraConfig, got 'use_kan'", use_kan=True)
config_case("a key of run time", "every key must be a setting .* 'runtime_config'", runtime_config={})
config_case("a path in target_modules", "target_modules must hold names of modules", target_modules=["../../etc"])
config_case("NUL in target_modules", "target_modules must hold names of modules", target_modules=["0\0", "1"])
config_case("a path in rank_pattern", "rank_pattern must hold names of modules", rank_pattern={"/etc/passwd": 2})
config_case("no regular expression", "rank_pattern must be a regular expression", rank_pattern={"(": 2})
config_case("no regular expression to target", "target_modules must be a regular expression", target_modules="*")
config_case("a peft_type of nobody", "peft_type must be one of those that peft knows, got 'EVIL'", peft_type="EVIL")
config_case("a peft_type that is a list", "peft_type must be one of those that peft knows", peft_type=["LSLORA"])
config_case("no peft_type", "must have the key peft_type", without="peft_type")
config_case("a task of nobody", "Invalid task type: 'EVIL'", task_type="EVIL")
config_case("scales that are fixed", "has .*scale_offset, which its config does not know", learn_scales=False)
config_case("a grid that is not measured", "has .*grid_scale, which its config does not know", calibration_steps=0)
config_case("a bias of B that is not there", "has no .*lora_B.bias, which its config asks for", lora_bias=True)
config_case("a module to save without tensors", "has no tensor of 2, which", modules_to_save=["2"])
config_case("a module to save and to adapt", "has no|must have", modules_to_save=["1"])
config_case("tokens without tensors", "has no trainable_tokens_delta", trainable_token_indices=[1])
config_case("a token before the first", "trainable_token_indices must be at least 0", trainable_token_indices=[-1])
config_case("DoRA", "use_dora is a LoRA variant", use_dora=True)
raw_case("no JSON", f"{CONFIG} must be JSON in UTF-8", b"{'r': 2}")
raw_case("an empty config", f"{CONFIG} must be JSON", b"")
raw_case("a config in UTF-16", f"{CONFIG} must be JSON in UTF-8", json.dumps(settings()).encode("utf-16"))
raw_case("a list", f"{CONFIG} must hold a JSON object, got \\[1\\]", b"[1]")
raw_case("a number", f"{CONFIG} must hold a JSON object, got 7", b"7")
raw_case("a key twice", "a key must stand there once, got 'r'", legal()[0].replace(b"{", b'{"r": 2,', 1))
raw_case("nested 100,000 deep", "must be JSON of a few levels", b'{"r": ' + b"[" * 10**5 + b"]" * 10**5 + b"}")
raw_case("an integer of 5,000 digits", f"{CONFIG} must be JSON", b'{"r": ' + b"9" * 5000 + b"}")

weights_case("a header of 2**60 bytes", f"{WEIGHTS} must be a whole", lambda w: struct.pack("<Q", 2**60) + w[8:])
weights_case("weights that are cut", f"{WEIGHTS} must be a whole", lambda w: w[:-7])
weights_case("weights with more behind", f"{WEIGHTS} must be a whole", lambda w: w + b"\0" * 8)
weights_case("empty weights", f"{WEIGHTS} must be a whole", lambda w: b"")
weights_case("a header alone", f"{WEIGHTS} must be a whole", lambda w: w[:8])
weights_case("a header that is no JSON", f"{WEIGHTS} must be a whole", lambda w: w[:20] + b"!" + w[21:])
weights_case("no tensor", "must hold LS-LoRA's tensors, got 0 others", lambda w: pack({}, b""))
weights_case("A with a NaN", f"{LAYER}.lora_A.weight must be finite", fill(f"{LAYER}.lora_A.weight", float("nan")))
weights_case(
    "an infinite knot", "lora_spline.weight must be finite", fill(f"{LAYER}.lora_spline.weight", float("inf"))
)
header_case("offsets beyond the end", "must be a whole", entry(f"{LAYER}.lora_A.weight", data_offsets=[10**6, 10**7]))
header_case("offsets that overlap", "must be a whole", entry(f"{LAYER}.lora_B.weight", data_offsets=[0, 24]))
header_case("a shape of 2**62", "must be a whole", entry(f"{LAYER}.lora_A.weight", shape=[2**62, 2**62]))
header_case("whole numbers for a matrix", "must be of one of the types", entry(f"{LAYER}.lora_A.weight", dtype="I32"))
header_case(
    "A turned around", "must have the shape .2, any., got .4, 2.", entry(f"{LAYER}.lora_A.weight", shape=[4, 2])
)
header_case("A flattened", "must have the shape .2, any., got .8,", entry(f"{LAYER}.lora_A.weight", shape=[8]))
for new, words in (
    ("../../evil.lora_A.weight", "a tensor's name must be"),
    ("/etc/passwd", "a tensor's name must be"),
    ("base_model\0.lora_A.weight", "a tensor's name must be"),
    (f"{LAYER}.lora_C.weight", "has .*lora_C.weight, which its config does not know"),
    ("base_model.model.7.lora_A.weight", "has no"),
):
    header_case(f"a tensor {new!r}", words, rename(f"{LAYER}.lora_A.weight", new))
header_case("a spline's scale missing", "has no", rename(f"{LAYER}.lora_spline.grid_scale", f"{LAYER}.other"))


@case("100 MB of config", "must have at most 4194304 bytes, got 104857600")
def _(folder: Path) -> None:
    write(folder, *legal())
    os.truncate(folder / CONFIG, 100 * 2**20)


@case("no weights", f"must hold {WEIGHTS}, got no such file")
def _(folder: Path) -> None:
    write(folder, *legal())
    (folder / WEIGHTS).unlink()


@case("a pickle", "adapter_model.bin: an adapter must be saved as adapter_model.safetensors alone")
def _(folder: Path) -> None:
    write(folder, *legal())
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(folder / "unpickled")))


@case("a pickle beside safetensors", "adapter_model.bin: an adapter must be saved as")
def _(folder: Path) -> None:
    write(folder, *legal())
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(folder / "unpickled")))


@case("a pickle by the name of safetensors", f"{WEIGHTS} must be a whole safetensors file")
def _(folder: Path) -> None:
    write(folder, legal()[0], pickle.dumps(Evil(folder / "unpickled")))


@case("a zip by the name of safetensors", f"{WEIGHTS} must be a whole safetensors file")
def _(folder: Path) -> None:
    write(folder, *legal())
    with zipfile.ZipFile(folder / WEIGHTS, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(folder / "unpickled")))


NASTY: list[Any] = [
    *(None, True, "", "0", "../..", "\0", -1, 0, 1, 2, 3, 7, 10**9, 10**400, 1e308, float("nan"), float("inf"), 0.5),
    *([], ["0"], ["0", "1"], [[0, 1]], {}, {"0": 2}, {"(": 1}, {"0": 1e9}, "all-linear", ".*", "clamp", "weight"),
]


def flipped(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def other_config(chance: random.Random, config: bytes) -> bytes:
    """Values swapped, of a few keys or between two; keys renamed, dropped or doubled; or bytes flipped or cut off."""
    found = json.loads(config)
    one, two = chance.sample(sorted(found), 2)
    match chance.randrange(6):
        case 0:
            return flipped(chance, config)
        case 1:
            return config[: chance.randrange(len(config))]
        case 2:
            found[one], found[two] = found[two], found[one]
        case 3:
            found[one[:-1]] = found.pop(one)
        case 4:
            return config.replace(b"{", b"{" + json.dumps({one: chance.choice(NASTY)}).encode()[1:-1] + b", ", 1)
        case _:
            found[one] = chance.choice(NASTY)
    return json.dumps(found).encode()


def other_weights(chance: random.Random, weights: bytes) -> bytes:
    """Bytes of the header or of the body flipped or cut off, or what the header says of tensors exchanged."""
    header, body = unpack(weights)
    tensors = sorted(set(header) - {"__metadata__"})
    one, two = chance.sample(tensors, 2)
    field = chance.choice(("shape", "dtype", "data_offsets"))
    match chance.randrange(7):
        case 0:
            return weights[:8] + flipped(chance, weights[8 : -len(body)]) + body
        case 1:
            return weights[: -len(body)] + flipped(chance, body)
        case 2:
            return weights[: chance.randrange(len(weights))]
        case 3:
            return struct.pack("<Q", chance.getrandbits(chance.randint(1, 64))) + weights[8:]
        case 4:
            header[one][field], header[two][field] = header[two][field], header[one][field]
        case 5:
            header[one][field] = chance.choice([*NASTY, "F16", "BF16", "I32", [4, 2], [2**62, 4], [0, 2**63], [0, 32]])
        case _:
            header[chance.choice([one[:-1], two, f"{two}.weight"])] = header.pop(one)
    return pack(header, body)


def mutant(number: int, seed: int) -> tuple[bytes, bytes]:
    chance = random.Random(f"{seed} {number}")
    config, weights = legal()
    which = chance.randrange(5)
    return (
        other_config(chance, config) if which != 1 else config,
        other_weights(chance, weights) if which != 0 else weights,
    )


def run_by_hand(name: str, folder: Path) -> str:
    """`"refused"`, or what is wrong."""
    import re

    make, words = CASES[name]
    make(folder)
    found = verdict(folder)
    if (folder / "unpickled").exists():
        return "its pickle ran"
    if found == "loaded":
        return "was loaded"
    if not found.startswith("refused: "):
        return found
    return "refused" if re.search(words, found, re.DOTALL) else f"the message must have {words!r}: {found}"


def verdict(folder: Path) -> str:
    try:
        return outcome(folder)
    except Exception as error:  # whatever else comes is what is looked for
        return f"{type(error).__name__}: {error}"


def main(argv: list[str]) -> int:
    """Run all; 1 if an adapter was neither refused nor loaded as it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuzzed", type=int, default=2000, metavar="N", help="how many mutations of a legal adapter")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    counts: Counter[tuple[str, str]] = Counter()
    failures = []
    with TemporaryDirectory() as place:
        for number, name in enumerate(CASES):
            found = run_by_hand(name, Path(place, f"hand{number}"))
            counts["by hand", found if found == "refused" else "FAILED"] += 1
            if found != "refused":
                failures.append(f"{name}: {found}")
        for number in range(args.fuzzed):
            folder = Path(place, "fuzzed")
            write(folder, *mutant(number, args.seed))
            found = verdict(folder).partition(":")[0]
            counts["by chance", found if found in OUTCOMES else "FAILED"] += 1
            if found not in OUTCOMES:
                failures.append(f"mutant({number}, {args.seed}): {verdict(folder)}")
    for (kind, found), count in sorted(counts.items()):
        print(f"{kind:10} {found:10} {count:6}")
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
