"""What the processes of a gang say to each other: one form, whole or not at all, and no kind of message in a string."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hpclab
from hpclab.gangs import rank, wire

GANGS = Path(hpclab.__file__).with_name("gangs")
KINDS = wire._KINDS
text = st.text(st.characters(codec=None))
place = st.builds(wire.RankPlace, run=text, folder=text, resume=st.none() | text)


def messages(kind):
    """Messages of one kind, with any text, also lone surrogates, and any body that this kind takes."""
    names = typing.get_type_hints(kind)
    known = {str: text, wire.RankPlace: place, tuple[str, int] | None: st.none() | st.tuples(text, st.integers())}
    fields = {name: known.get(names[name], st.from_type(names[name])) for name in names}
    fields |= {"machine": st.dictionaries(text, text)} if "machine" in names else {}
    fields |= {"result": st.none() | st.booleans() | st.integers()} if "result" in names else {}
    fields["body"] = st.binary().map(bytes.hex).map(str.encode) if kind is wire.Row else st.binary()
    return st.builds(kind, **fields)


concrete = [kind for kind in KINDS.values() if kind not in (wire.Order, wire.Record, wire.FromCell, wire.News)]
anything = st.one_of([messages(kind) for kind in concrete])


def plain(message):
    """As JSON has it: a tuple is a list there, and NaN equals NaN."""
    return repr(json.loads(json.dumps(dataclasses.asdict(message) | {"body": message.body.hex()}))), type(message)


@pytest.mark.parametrize("kind", concrete, ids=lambda kind: kind.__name__)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_each_kind_comes_back_as_it_was(kind, data):
    message = data.draw(messages(kind))
    [decoded] = wire.decode(wire.encode(message))
    assert plain(decoded) == plain(message)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(anything, max_size=5), st.data())
def test_a_stream_that_is_cut_anywhere_gives_whole_messages(several, data):
    stream = b"".join(map(wire.encode, several))
    cut = data.draw(st.integers(0, len(stream)))
    buffer, came = bytearray(stream[:cut]), []
    for more in (stream[cut:], b""):
        while (message := wire.take_frame(buffer)) is not None:
            came.append(plain(message))
        buffer += more
    assert came == [plain(message) for message in several]
    assert not buffer


@pytest.mark.parametrize(
    "garbage",
    [
        b"x\n",
        b"{}\n",
        b"[]\n",
        b'{"kind": "Nothing", "body": 0}\n',
        b'{"kind": "Stop", "body": 0, "more": 1}\n',
        b'{"kind": "StopAt", "body": 0}\n',
        b'{"kind": "Row", "body": 1}\n\xff',
        b'{"kind": "Row", "body": "1"}\n1',
    ],
)
def test_what_is_no_message_is_an_error(garbage):
    with pytest.raises((KeyError, TypeError, ValueError)):
        wire.decode(garbage)


def test_a_line_without_end_is_an_error():
    with pytest.raises(ValueError, match=r"no end of line in 10,000,001 bytes"):
        wire.take_frame(bytearray(wire.LONGEST_HEAD + 1))


def test_the_body_of_a_row_is_its_line_in_the_file():
    row = wire.Row.of({"loss": 0.1, "note": "é\udcff"})
    assert row.parse("measured") == (
        {"loss": 0.1, "note": "é\udcff", "source": "measured"},
        '{"loss": 0.1, "note": "\\u00e9\\udcff", "source": "measured"}\n',
    )
    odd, line = wire.Row.of({"loss": float("-inf"), "note": "NaN"}).parse("emulated")
    assert odd == {"loss": float("-inf"), "note": "NaN", "source": "emulated"}
    assert line == '{"loss": null, "note": "NaN", "source": "emulated"}\n'


MARK = "only this row says so"


def report_once():
    hpclab.report(step=1, note=MARK)


def count_parses():
    """From now on remember what this process reads as JSON, or writes."""
    json.parsed, json.written = [], []
    decode, encode = json.kept = json.JSONDecoder.decode, json.JSONEncoder.encode
    json.JSONDecoder.decode = lambda decoder, text: (json.parsed.append(text), decode(decoder, text))[1]
    json.JSONEncoder.encode = lambda encoder, value: (
        json.written.append(encode(encoder, value)),
        json.written[-1],
    )[1]


def count_no_more():
    json.JSONDecoder.decode, json.JSONEncoder.encode = json.kept
    del json.kept, json.parsed, json.written


def marked():
    """How often this process has read and written the row."""
    return sum(MARK in text for text in json.parsed), sum(MARK in text for text in json.written)


def test_a_row_is_one_text_from_its_rank_to_the_file_and_parsed_once(client):
    """The scheduler is in this process, too."""
    count_parses()
    client.run(count_parses)
    try:
        run = hpclab.launch(client, report_once, ranks=1)
        run.result(60)
        assert marked() == (1, 0), "parsed once by the kernel, for run.rows"
        assert set(client.run(marked).values()) == {(0, 0)}, "a worker passes it on"
    finally:
        count_no_more()
        client.run(count_no_more)
    [line] = [line for line in (run.folder / "rows.jsonl").read_text().splitlines() if MARK in line]
    assert json.loads(line) == run.rows[1]
    assert line.startswith('{"kind": "step", "time_s": ') and line.endswith(', "source": "measured"}')


def test_ranks_import_the_wire_without_dask_or_torch():
    code = "import sys, hpclab.gangs.wire, hpclab.gangs.rank; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "hpclab.gangs.rank" in loaded
    assert not {"torch", "dask", "distributed", "IPython"} & set(loaded)


def literals(source):
    """Kinds of messages, and of what the first wire called orders and records, that a file spells out."""
    names = KINDS.keys() | {do.value for do in wire.Do}
    spelt = names | {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in names}
    spelt -= {*rank.RESERVED_KINDS, "failed"}  # of rows, and a status of runs
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Dict(keys=keys, values=values):
                found += [key for key in keys if is_text(key, {"order", "record", "said", "do"})]
                kinds = zip(keys, values, strict=True)
                found += [value for key, value in kinds if is_text(key, {"kind"}) and is_text(value, KINDS)]
            case ast.Subscript(slice=key) if is_text(key, {"order", "record", "said", "do"}):
                found.append(key)
            case ast.Compare(left=left, comparators=others):
                found += [value for value in (left, *others) if is_text(value, spelt)]
            case ast.MatchValue(value=value) if is_text(value, spelt):
                found.append(value)
            case ast.Tuple(elts=[first, *_]) if is_text(first, spelt):
                found.append(first)
    return [node.value for node in found]


def is_text(node, texts):
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in texts


@pytest.mark.parametrize("path", sorted(GANGS.glob("*.py")), ids=lambda path: path.name)
def test_no_kind_of_message_is_spelt_out(path):
    assert literals(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        'send({"order": order})',
        'record = {"record": kind}',
        'order["order"]',
        'if order == "stop_at": pass',
        'match order:\n    case "kill": pass',
        'inbox.put(("stop", now))',
        '{"kind": "Stop"}',
        'do in ("get", "set") or do == "compare_set"',
    ],
)
def test_a_kind_that_is_spelt_out_is_found(source):
    assert literals(source)


def test_only_the_wire_writes_and_reads_messages():
    """The zygote has an order of its own, with files, and hosts of a rendezvous tell their ports in a store."""
    users = {path.stem for path in GANGS.glob("*.py") if re.search(r"^import json", path.read_text("utf-8"), re.M)}
    assert users == {"wire", "process", "zygote", "store"}


def test_each_file_says_first_in_which_process_it_runs():
    places = ("All processes", "Kernel", "Scheduler", "Worker", "Host", "Rank")
    for path in GANGS.glob("*.py"):
        first = path.read_text("utf-8").splitlines()[0].removeprefix('"""')
        assert first.startswith(places) or path.stem == "__init__", f"{path.name}: {first}"
