"""The command line of `vlm run instruct`."""

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.procedures.captions import write_records
from vlm.procedures.instruct.coco import read_coco
from vlm.procedures.instruct.endpoint import Endpoint
from vlm.procedures.instruct.engine import Engine
from vlm.procedures.instruct.ledger import Ledger
from vlm.procedures.instruct.models import Model
from vlm.procedures.instruct.procedure import NUM_STYLES, Outcome, Procedure, Role
from vlm.procedures.instruct.rate_limiter import Clock, RateLimiter
from vlm.procedures.instruct.records import Item, check_pictures, read_records
from vlm.procedures.instruct.task_specs import NAMES, Kind, load_kind, styles
from vlm.seeding import seed_from

_SHOWN = 3


def main(arguments: list[str]) -> int:
    """`vlm run instruct`; returns 1 when no record was accepted."""
    # --key-env is --key_env
    spelled = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in arguments]
    options = _parser().parse_args(spelled)
    _check(options)
    kind = load_kind(options.kind)
    items = _items(options, kind)
    clock = Clock()
    procedure, attempts = _procedure(options, kind)
    progress = options.out.with_name(f"{options.out.name}.progress.jsonl")
    if options.out.exists() and not progress.exists():
        raise UserError(f"{options.out}: exists already; remove it or give another --out")
    settings = _settings(options, procedure)
    with Ledger(progress, settings=settings, records={item.id: item.digest() for item in items}) as ledger:
        chosen = _chosen(items, options.num, options.seed)
        engine = Engine(
            procedure,
            _models(options, kind, clock),
            ledger,
            attempts=attempts,
            parallel=options.parallel,
            clock=clock,
        )
        rejected = engine.run(chosen)
        return _write(options.out, chosen, engine, rejected)


def _parser() -> argparse.ArgumentParser:
    kinds = "\n".join(f"  {name:<20}{load_kind(name).what}" for name in NAMES)
    parser = argparse.ArgumentParser(
        prog="vlm run instruct",
        description="Instruction data written by a model. The same command goes on where it was stopped.",
        epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, **settings: Any) -> None:
        parser.add_argument(f"--{name}", **settings)

    add("kind", required=True, choices=NAMES, metavar="KIND", help="what to make, see below")
    add("records", type=Path, help="JSON list or JSONL of {id, image, captions, boxes: [{name, box}]}")
    add("captions", type=Path, help="COCO's captions_*.json, instead of --records")
    add("instances", type=Path, help="COCO's instances_*.json beside it, for the boxes")
    add("image_root", type=Path, help="where image paths start; default: the folder of the file")
    add("num", type=int, help="so many of the records, by lot; more of them later keep these")
    add("out", type=Path, required=True, help="file to write in LLaVA's form; a name in .jsonl gives JSONL")
    add("endpoint", metavar="URL", help="an OpenAI-compatible server, such as http://localhost:8000/v1")
    add("model", help="its name there")
    add("key_env", metavar="VARIABLE", help="environment variable that holds the key")
    add("request", action="append", default=[], metavar="FIELD=JSON", help="put into every request; null takes it out")
    add("local", metavar="FOLDER", help="a transformers chat model, instead of --endpoint; sees no pictures")
    add("weights", help="a system of this project, as in predict, for what is told from the picture")
    add("device", help="of --local and --weights; default: cuda where there is one")
    add("dtype", choices=("float32", "bfloat16", "float16"), help="of their weights; default: as they are stored")
    add("temperature", type=float, help="of the answers; 0 takes the likeliest, and one attempt (default 0.7)")
    add("top_p", type=float, help="(default 1)")
    add("max_tokens", type=int, help="limit on an answer; default by kind")
    add("attempts", type=int, help="at an answer that keeps to the rules; default 3, curate 1")
    add("parallel", type=int, default=1, help="requests under way at once, in one batch here (default %(default)s)")
    add("requests_per_minute", type=float, help="over all of them; default no limit")
    add("tries", type=int, default=6, help="at a request that fails, with growing pauses (default %(default)s)")
    add("timeout", type=float, default=120.0, help="seconds to wait for an answer (default %(default)g)")
    add("styles", type=Path, help="text file with a prompt per line, the style of recaption and in-context")
    add("seed", type=int, default=0)
    return parser


def _check(options: argparse.Namespace) -> None:
    """What can be said about the options alone."""
    for name, least in {"num": 1, "max_tokens": 1, "attempts": 1, "parallel": 1, "tries": 1}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    for name in ("timeout", "requests_per_minute"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value:g}: must be above 0")
    if options.temperature is not None and options.temperature < 0:
        raise UserError(f"--temperature {options.temperature:g}: must not be below 0")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise UserError(f"--top_p {options.top_p:g}: must be above 0 and at most 1")
    if (options.records is None) == (options.captions is None):
        raise UserError("give --records FILE, or COCO's --captions FILE (with --instances FILE)")
    if options.instances is not None and options.captions is None:
        raise UserError("--instances goes with --captions; records of --records have their own boxes")
    sees, curates = load_kind(options.kind).sees, options.kind == "curate"
    writers = [name for name in ("endpoint", "local") if getattr(options, name) is not None]
    if len(writers) > 1:
        raise UserError("give --endpoint or --local, not both")
    if options.weights is not None and not sees:
        raise UserError(f"--weights: {options.kind} is written from text; give --endpoint or --local")
    if options.weights is not None and writers and not curates:
        raise UserError(f"give --weights or --{writers[0]}, not both")
    if not writers and (options.weights is None or curates):
        raise UserError(
            f"{options.kind} needs a model: give --endpoint URL --model NAME"
            + (" or --weights ARTEFACT" if sees and not curates else " or --local FOLDER")
        )
    if options.local is not None and sees and options.weights is None:
        raise UserError(
            f"--local sees no pictures, which {options.kind} shows; give --endpoint, or add --weights"
            if curates
            else f"--local sees no pictures, which {options.kind} shows; give --endpoint or --weights"
        )
    if (options.endpoint is None) != (options.model is None):
        raise UserError("--endpoint and --model go together")
    for name in ("key_env", "request"):
        if getattr(options, name) and options.endpoint is None:
            raise UserError(f"--{name} goes with --endpoint")


def _items(options: argparse.Namespace, kind: Kind) -> list[Item]:
    if options.records is not None:
        items = read_records(options.records, kind, image_root=options.image_root)
    else:
        if missing := kind.needs - {"captions", "image"}:
            raise UserError(f"{kind.name} needs {', '.join(sorted(missing))}, which COCO has not; give --records")
        items = read_coco(options.captions, options.instances, image_root=options.image_root)
    if kind.sees:
        check_pictures(items)
    if "{boxes}" in kind.request and not any(item.boxes for item in items):
        print(f"note: no record has boxes, which {kind.name} was published with", file=sys.stderr)
    return items


def _procedure(options: argparse.Namespace, kind: Kind) -> tuple[Procedure, int]:
    """What is done, and how many attempts it takes at most."""
    given = {key: getattr(options, key) for key in ("temperature", "top_p", "max_tokens")}
    sampling = replace(kind.sampling, **{key: value for key, value in given.items() if value is not None})
    procedure = Procedure(kind, options.seed, sampling, kind.describing, _styles(options.styles))
    attempts = kind.attempts if options.attempts is None else options.attempts
    always_the_same = sampling.temperature == 0 and kind.form != "curate"
    return procedure, 1 if always_the_same else attempts


def _styles(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return styles()
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--styles {path}: cannot be read ({error})") from error
    if len(found) < NUM_STYLES:
        raise UserError(f"--styles {path}: holds {len(found)} prompts, {NUM_STYLES} are shown each time; add some")
    return tuple(found)


def _models(options: argparse.Namespace, kind: Kind, clock: Clock) -> dict[Role, Model]:
    models: dict[Role, Model] = {}
    here = {"parallel": options.parallel, "device": options.device, "dtype": options.dtype}
    if options.endpoint is not None:
        models["writer"] = Endpoint(
            options.endpoint,
            model=options.model,
            key=_key(options.key_env),
            fields=_fields(options.request),
            pace=RateLimiter(clock, requests_per_minute=options.requests_per_minute),
            tries=options.tries,
            timeout=options.timeout,
        )
    elif options.local is not None:
        from vlm.procedures.instruct.local import LocalChat

        models["writer"] = LocalChat(options.local, **here)
    if options.weights is not None:
        from vlm.procedures.instruct.local import OwnSystem

        models["describer"] = OwnSystem(options.weights, **here)
    role: Role = "writer" if "writer" in models else "describer"
    return {"writer": models[role], "describer": models.get("describer", models[role])}


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"--key_env {variable}: this environment variable is not set; export it with the key")
    return key


def _fields(entries: Sequence[str]) -> dict[str, Any]:
    fields = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        try:
            fields[name] = json.loads(value)
        except ValueError as error:
            raise UserError(
                f"--request {entry}: write FIELD=JSON, such as max_tokens=null or stop='[\"#\"]'"
            ) from error
        if not equals or not name or name in ("model", "messages", "stream"):
            raise UserError(f"--request {entry}: write FIELD=JSON; model, messages and stream are not to be set")
    return fields


def _settings(options: argparse.Namespace, procedure: Procedure) -> dict[str, Any]:
    """What decides about the answers. Where a server is, how fast and how often it is asked, may change."""
    asked = json.dumps([procedure.kind.source, procedure.styles], sort_keys=True)
    return {
        "kind": procedure.kind.name,
        "prompts": hashlib.blake2b(asked.encode(), digest_size=6).hexdigest(),
        "model": options.model if options.endpoint is not None else options.local,
        "weights": options.weights,
        "request": _fields(options.request),
        "sampling": asdict(procedure.sampling),
        "seed": options.seed,
    }


def _chosen(items: Sequence[Item], num: int | None, seed: int) -> list[Item]:
    """All of them, or a part by lot, in their order; a larger part holds a smaller one."""
    if num is None or num >= len(items):
        return list(items)
    drawn = sorted(items, key=lambda item: seed_from(seed, item.id, "chosen"))[:num]
    names = {item.id for item in drawn}
    return [item for item in items if item.id in names]


def _write(out: Path, items: Sequence[Item], engine: Engine, rejected: Mapping[str, Outcome]) -> int:
    """Writes what was accepted and what was not, and says so in a line."""
    refused = out.with_name(f"{out.name}.rejected.jsonl")
    refused.unlink(missing_ok=True)
    notes = []
    if rejected:
        chosen = (item for item in items if item.id in rejected)
        write_records(refused, ({"id": i.id, "image": i.image, "reasons": rejected[i.id].reasons} for i in chosen))
        counts = Counter(found.reasons[-1] for found in rejected.values()).most_common()
        shown = ", ".join(f"{count} {reason}" for reason, count in counts[:_SHOWN])
        notes = [f"{len(rejected)} rejected: {shown}{', ...' if len(counts) > _SHOWN else ''} ({refused})"]
    spent = f"{len(engine.ledger)} requests, {engine.ledger.num_tokens:,} tokens written"
    good = len(items) - len(rejected)
    if good:
        write_records(out, engine.accepted(items, rejected), replace=True)
        print("; ".join([f"{out}: {good} of {len(items)} records", *notes, spent]))
        return 0
    out.unlink(missing_ok=True)
    print("; ".join([f"{out}: not written, no record was accepted", *notes, spent]))
    return 1
