"""CSV traces: what is read, and what is said of what cannot be."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.errors import UserError
from workloads import Azure, BurstGpt, Csv, TraceFormat, TraceRows, trace_format

Write = Callable[..., Path]
Rows = list[tuple[int, int, int]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*lines: str, name: str = "trace.csv", end: str = "\n") -> Path:
        path = tmp_path / name
        path.write_bytes("".join(line + end for line in lines).encode())
        return path

    return write


def read(kind: str | TraceFormat, path: Path) -> Rows:
    """(ns, prompt, output) of every request."""
    reader = trace_format[kind]() if isinstance(kind, str) else kind
    return [row for rows in reader.read(path) for row in tuples(rows)]


def tuples(rows: TraceRows) -> Rows:
    columns = (rows.arrival_time, rows.prompt_tokens, rows.output_tokens)
    assert all(column.dtype == np.int64 for column in columns)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def complaint(kind: str | TraceFormat, path: Path) -> str:
    """What is said of the file, without the folder it lies in."""
    with pytest.raises(UserError) as caught:
        read(kind, path)
    return str(caught.value).replace(f"{path.parent}/", "")


# One sample of each format


def test_plain_csv(write: Write) -> None:
    path = write("arrival_time_s,prompt_tokens,output_tokens", "0.0,12,34", "0.25,5,1", "0.25,700,0")
    assert read("csv", path) == [(0, 12, 34), (250_000_000, 5, 1), (250_000_000, 700, 1)]


def test_azure_of_2023_without_an_offset_and_without_the_last_line_end(write: Write) -> None:
    path = write(
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,4808,10",
        "2023-11-16 18:17:04.0319600,3180,8",
        end="\r\n",
    )
    path.write_bytes(path.read_bytes().rstrip(b"\r\n"))
    rows = read("azure", path)
    assert [(time - rows[0][0], prompt, output) for time, prompt, output in rows] == [
        (0, 4808, 10),
        (52_000_000, 3180, 8),
    ]
    assert rows[0][0] == 1_700_158_623_979_960_000


def test_azure_of_2024_with_an_offset_of_nothing(write: Write) -> None:
    path = write(
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2024-05-10 00:00:00.009930+00:00,2162,5",
        "2024-05-10 00:00:00.0170335+00:00,2399,6",
        "2024-05-10 00:00:01+00:00,76,15",
        "2024-05-10T00:00:01.5,76,15",
    )
    first = 1_715_299_200_009_930_000
    assert [time - first for time, _, _ in read("azure", path)] == [0, 7_103_500, 990_070_000, 1_490_070_000]


def test_burstgpt_leaves_failures_out(write: Write) -> None:
    path = write(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,472,18,490,Conversation log",
        "45,ChatGPT,0,0,0,API log",
        "45,GPT-4,1087,0,1087,API log",
        '118.5,"GPT-4, turbo",417,276,693,Conversation log',
    )
    assert read("burstgpt", path) == [(5_000_000_000, 472, 18), (118_500_000_000, 417, 276)]


def test_burstgpt_of_version_3_has_more_columns(write: Write) -> None:
    path = write(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,s-1,0.7,ChatGPT,472,18,490,Conversation log",
    )
    assert read("burstgpt", path) == [(5_000_000_000, 472, 18)]


def test_burstgpt_can_spread_the_arrivals_of_a_second(write: Write) -> None:
    lines = [f"{second},m,{10 + number},3,0,x" for number, second in enumerate((1, 1, 1, 1, 2, 9, 9))]
    path = write("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", *lines)
    times = [time / 1e9 for time, _, _ in read(BurstGpt(spread_ms=1000), path)]
    assert times == [1.0, 1.25, 1.5, 1.75, 2.0, 9.0, 9.5]


def test_vidur(write: Write) -> None:
    path = write(
        "arrived_at,num_prefill_tokens,num_decode_tokens",
        "0.200351,72,71",
        "0.395033,98.0,172.0",
    )
    assert read("vidur", path) == [(200_351_000, 72, 71), (395_033_000, 98, 172)]


# Names and units


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("arrived_at,num_prefill_tokens,num_decode_tokens", "1.5,2,3", (1_500_000_000, 2, 3)),
        ("req_time_s,client_id,prompt_len,output_len", "1.5,13,2,3", (1_500_000_000, 2, 3)),
        ("Arrival Time MS,Output-Length,INPUT_LENGTH", "1.5,3,2", (1_500_000, 2, 3)),
        ("arrival_time_ns,input_toks,output_toks", "1500,2,3", (1500, 2, 3)),
        ("timestamp_us,ContextTokens,GeneratedTokens", "1.5,2,3", (1500, 2, 3)),
        ('"timestamp" , prompt , output ', " 1.5 , 2 , 3 ", (1_500_000_000, 2, 3)),
    ],
)
def test_columns_go_by_the_names_in_use(
    write: Write, header: str, row: str, expected: tuple[int, int, int]
) -> None:
    assert read("csv", write(header, row)) == [expected]


def test_columns_can_be_named(write: Write) -> None:
    path = write("t_ms,timestamp,in,out,input", "10,x,7,8,y")
    assert read(Csv(time_column="t_ms", prompt_column="in", output_column="out"), path) == [
        (10_000_000, 7, 8)
    ]
    assert complaint(Csv(time_column="t_sm"), path) == (
        "trace.csv:1: no column for the arrival time: got t_ms, timestamp, in, out, input; expected t_sm; "
        "did you mean 't_sm' instead of 't_ms'?"
    )


# What is wrong, and where


GOOD = ("arrival_time_s,prompt_tokens,output_tokens", "0,1,1", "1,2,2", "2,3,3")
HEADER = "(arrival_time_s, prompt_tokens, output_tokens)"
COUNT = "expected a whole number of tokens from 0 to 2147483647"
SECONDS = "expected a time in seconds from 0 to 4.61e+09"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("3,4", f"wrong number of fields: got 2, expected 3 {HEADER}"),
        ("3,4,5,", f"wrong number of fields: got 4, expected 3 {HEADER}"),
        ("3", f"wrong number of fields: got 1, expected 3 {HEADER}"),
        ("3;4;5", f"wrong number of fields: got 1, expected 3 {HEADER}"),
        ("3,four,5", f"prompt_tokens: got 'four', {COUNT}"),
        ("3,,5", f"prompt_tokens: got '', {COUNT}"),
        ("3,4.5,5", f"prompt_tokens: got '4.5', {COUNT}"),
        ("3,4,-5", f"output_tokens: got '-5', {COUNT}"),
        ("3,4,3000000000", f"output_tokens: got '3000000000', {COUNT}"),
        ("3,nan,5", f"prompt_tokens: got 'nan', {COUNT}"),
        ("3,4,inf", f"output_tokens: got 'inf', {COUNT}"),
        ("soon,4,5", f"arrival_time_s: got 'soon', {SECONDS}"),
        ("-3,4,5", f"arrival_time_s: got '-3', {SECONDS}"),
        ("1e300,4,5", f"arrival_time_s: got '1e300', {SECONDS}"),
        ("\N{REPLACEMENT CHARACTER},4,5", f"arrival_time_s: got '\N{REPLACEMENT CHARACTER}', {SECONDS}"),
        (
            "1.5,4,5",
            "not in order: got an arrival 0.5 s before that of the row above, expected rows in order of "
            "arrival",
        ),
        ("3,0,5", "got a prompt of 0 tokens, expected at least 1"),
        ('"3\n4",4,5', f"wrong number of fields: got 1, expected 3 {HEADER}"),
    ],
)
def test_a_bad_row_is_told_with_its_line(write: Write, row: str, message: str) -> None:
    assert complaint("csv", write(*GOOD, row, "9,9,9")) == f"trace.csv:5: {message}"


def test_lines_are_counted_across_blank_ones_and_blocks(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workloads.files.BLOCK", 20)
    assert read("csv", write(GOOD[0], "", "  ", *GOOD[1:], "", "")) == [
        (0, 1, 1),
        (10**9, 2, 2),
        (2 * 10**9, 3, 3),
    ]
    path = write("", GOOD[0], "", *GOOD[1:], "   ", "3,4,x", "4,5,6")
    assert complaint("csv", path) == f"trace.csv:8: output_tokens: got 'x', {COUNT}"
    path = write("", GOOD[0], "", *GOOD[1:], "   ", "1,4,4", "4,5,6")
    assert complaint("csv", path).startswith("trace.csv:8: not in order: got an arrival 1 s before")
    path = write(GOOD[0], *(f"{number},1,1" for number in range(500)), "499,0,1")
    assert complaint("csv", path) == "trace.csv:502: got a prompt of 0 tokens, expected at least 1"


def test_a_row_is_a_line_even_in_columns_that_nobody_reads(write: Write) -> None:
    path = write(
        "Timestamp,Request tokens,Response tokens,Log Type", "5,4,3,x", '6,4,3,"two', 'lines"', "7,4,3,x"
    )
    assert complaint("burstgpt", path) == (
        "trace.csv:4: wrong number of fields: got 1, expected 4 (Timestamp, Request tokens, Response tokens, "
        "Log Type)"
    )


def test_a_header_without_the_columns_is_told_with_the_nearest_name(write: Write) -> None:
    path = write("arrivel_time_s,prompt_tokens,output_tokens", "1,2,3")
    assert complaint("csv", path) == (
        "trace.csv:1: no column for the arrival time: got arrivel_time_s, prompt_tokens, output_tokens; "
        "expected arrival_time, arrived_at, arrival, timestamp, req_time, request_time, start_time, time "
        "(in seconds, or with _ms, _us or _ns at the end); did you mean 'arrival_time_s' instead of "
        "'arrivel_time_s'? (time_column names a column that is called otherwise)"
    )
    path = write("TIMESTAMP,ContextTokens,GenerateTokens", "x")
    assert complaint("azure", path) == (
        "trace.csv:1: no column for output tokens: got TIMESTAMP, ContextTokens, GenerateTokens; expected "
        "GeneratedTokens; did you mean 'GeneratedTokens' instead of 'GenerateTokens'?"
    )
    assert complaint("csv", write("1,2,3", "4,5,6")).startswith(
        "trace.csv:1: no column for the arrival time: got 1, 2, 3; expected arrival_time, "
    )


def test_files_without_rows(write: Write) -> None:
    for lines in ((), ("", "  ")):
        assert complaint("csv", write(*lines)) == (
            "trace.csv:1: the file is empty, expected a header such as arrival_time, prompt_tokens, "
            "output_tokens"
        )
    assert complaint("csv", write(GOOD[0])) == "trace.csv: no rows under the header"
    assert complaint("csv", write(GOOD[0], "", " ")) == "trace.csv: no rows under the header"


@pytest.mark.parametrize(
    "stamp",
    [
        "", "now", "NaT", "2023", "2023-11-16", "2023-13-16 18:17:03.97", "2023-11-16 18:17:03.97+02:00",
        "2023-11-16 18:17:03.1234567890", "16/11/2023 18:17:03", "é",
        "2023-11-16 18:17:03.97 and more words after it",
    ],
)  # fmt: skip
def test_azure_takes_nothing_but_utc_stamps(write: Write, stamp: str) -> None:
    path = write("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.97,1,1", f"{stamp},2,2")
    assert complaint("azure", path) == (
        f"trace.csv:3: TIMESTAMP: got {stamp!r}, expected a time such as 2023-11-16 18:17:03.9799600, "
        "with or without +00:00"
    )


def test_azure_rows_have_to_be_in_order(write: Write) -> None:
    stamps = ("18:17:03.9799600", "18:17:03.9799601", "18:17:02.9799601")
    path = write("TIMESTAMP,ContextTokens,GeneratedTokens", *(f"2023-11-16 {stamp},1,1" for stamp in stamps))
    assert complaint("azure", path).startswith("trace.csv:4: not in order: got an arrival 1 s before")


# Files


def test_a_missing_file_is_told_with_its_neighbour(write: Write, tmp_path: Path) -> None:
    write(*GOOD, name="azure_code.csv")
    wrong = tmp_path / "azure_cod.csv"
    assert complaint("csv", wrong) == "azure_cod.csv: no such file; did you mean 'azure_code.csv'?"
    assert complaint("csv", tmp_path / "nowhere" / "x") == "x: no such file"
    assert complaint("csv", tmp_path / "zzz") == "zzz: no such file"


def test_folders_and_broken_archives_are_told(write: Write, tmp_path: Path) -> None:
    assert complaint("csv", tmp_path / "") == f"{tmp_path}: cannot be read: Is a directory".replace(
        f"{tmp_path.parent}/", ""
    )
    packed = gzip.compress("\n".join([GOOD[0], *(f"{n},1,1" for n in range(10_000))]).encode())
    for broken in (
        packed[: len(packed) // 2],
        packed[:12],
        packed[:-8] + b"12345678",
        packed[:20] + bytes(50),
    ):
        path = tmp_path / "trace.csv.gz"
        path.write_bytes(broken)
        assert complaint("csv", path).startswith("trace.csv.gz: cannot be read: ")


rows_in_order = st.lists(
    st.tuples(st.integers(0, 10**15), st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1)),
    min_size=1,
    max_size=60,
).map(lambda rows: sorted(rows, key=lambda row: row[0]))


@given(
    rows_in_order,
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 300),
)
@settings(max_examples=80, deadline=None)
def test_what_is_written_is_read_whatever_the_dress(
    tmp_path_factory: pytest.TempPathFactory,
    rows: Rows,
    end: str,
    packed: bool,
    marked: bool,
    quoted: bool,
    ended: bool,
    block: int,
) -> None:
    wrap = '"{}"'.format if quoted else "{}".format
    lines = ["ignored,arrival_time_ns,prompt_tokens,output_tokens"]
    lines += [f"a b,{time},{wrap(prompt)},{output}.0" for time, prompt, output in rows]
    data = ("\ufeff" * marked + end.join(lines) + end * ended).encode()
    path = tmp_path_factory.getbasetemp() / "dressed.csv"
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workloads.files.BLOCK", block)
        assert read("csv", path) == rows


@given(
    st.integers(1, 400),
    st.data(),
    st.sampled_from(
        ["", "x", "-1", "1,1", "nan", "1e999", '"', "\t", "é", "0x1", "1 1", "None", "[]", "2023-01-01"]
    ),
)
@settings(max_examples=80, deadline=None)
def test_one_bad_cell_is_found_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, count: int, data: st.DataObject, bad: str
) -> None:
    rows = [[str(number), "5", "6"] for number in range(count)]
    line = data.draw(st.integers(0, count - 1))
    rows[line][data.draw(st.integers(0, 2))] = bad
    path = tmp_path_factory.getbasetemp() / "spoilt.csv"
    path.write_text("\n".join([GOOD[0], *(",".join(row) for row in rows)]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workloads.files.BLOCK", 200)
        assert complaint("csv", path).startswith(f"spoilt.csv:{line + 2}: ")


@given(
    st.sampled_from(trace_format.kinds),
    st.sampled_from(
        ["", *GOOD[:1], "TIMESTAMP,ContextTokens,GeneratedTokens", "Timestamp,Request tokens,Response tokens"]
    ),
    st.binary(max_size=200) | st.text("0123456789,.\n\"'-:[]{}e \x00", max_size=200).map(str.encode),
)
@settings(max_examples=150, deadline=None)
def test_any_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, header: str, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "anything"
    path.write_bytes(header.encode() + b"\n" + data)
    rows: Rows = []
    refusal = None
    try:
        rows = read(kind, path)
    except UserError as error:
        refusal = str(error)
    assert refusal is None or refusal.startswith(str(path))
    assert all(prompt >= 1 and output >= 1 for _, prompt, output in rows)
    assert rows == sorted(rows, key=lambda row: row[0])


def test_a_long_file_is_never_all_in_memory(write: Write) -> None:
    path = write(GOOD[0], *(f"{number},100,100" for number in range(60_000)))
    sizes = [len(rows) for rows in Csv().read(path)]
    assert sum(sizes) == 60_000
    assert max(sizes) * 8 <= 2**18


def test_formats_that_show_a_date_or_the_time_of_day_say_so() -> None:
    assert {kind for kind in trace_format.kinds if trace_format[kind].absolute} == {"azure", "burstgpt"}
    assert Azure().content_grain == 0
