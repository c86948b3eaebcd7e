from pathlib import Path

from bench import gpu, report, rows

ROOT = Path(__file__).parents[2]

MACHINE = {"machine": "a machine", "commit": "abc"}
TIMES = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0}


def test_table_keeps_the_newest_row_of_a_case_and_losing_ones():
    ours = {"operator": "fused_itc_loss", "case": "ours", "B": 8, "D": 4, "dtype": "float32", **TIMES, **MACHINE}
    newer = {**ours, "p50_ms": 1.5, "share_of_limit": 0.5}
    faster = {**ours, "case": "eager", "p50_ms": 0.5, "peak_mib": 7.0}
    masking = {"operator": "gather", "implementation": "cpu", "batch": 2, "copy_share": 0.25, **TIMES, **MACHINE}
    failed = {"operator": "fused_itc_loss", "case": "peer", "error": "out of memory", **MACHINE}
    head, _, *lines = report.table([ours, newer, faster, masking, failed]).splitlines()
    assert head.count("|") == len(report.COLUMNS) + 1
    assert [line.split(" | ")[1] for line in lines] == ["eager", "ours", "cpu"]
    assert "50 % of the product rate" in lines[1]
    assert "25 % of the copy rate" in lines[2]


def test_rows_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_RESULTS", str(tmp_path))
    rows.write("some", operator="x", p50_ms=1.0)
    (row,) = rows.read(tmp_path)
    assert row["operator"] == "x"
    assert all(row[name] for name in ("machine", "torch", "python", "commit", "time"))


def test_campaign_covers_the_documented_bars():
    for name in ("itc 65536 x 768", "itc graph 4096", "itc 1048576", "itc repeats", "siglip 65536"):
        assert name in gpu.STAGES


def test_documented_sizes_without_a_row_are_listed_as_not_measured():
    bar = {"operator": "fused_itc_loss", "case": "ours", "B": 65536, "D": 768, "dtype": "bfloat16", **TIMES, **MACHINE}
    before = report.unmeasured([bar]).splitlines()
    after = report.unmeasured([{**bar, "machine": f"NVIDIA {report.GPU}"}]).splitlines()
    assert len(before) == 2 + len(report.GPU_BARS)
    assert set(before) - set(after) == {f"| fused_itc_loss | B 65536, D 768 | bfloat16 | {report.GPU} | not measured |"}


def test_errors_have_a_column_for_each_loss():
    row = {"operator": "fused_itc_loss", "B": 8, "D": 4, "dtype": "float32", "scale": 100.0, **MACHINE}
    first = {**row, "case": "accuracy, random", "gradient_errors": {"ours": 1e-7}}
    second = {**row, "case": "accuracy, converged", "gradient_errors": {"ours": 2e-7, "eager": 3e-3}}
    head, _, *lines = report.accuracy([first, second]).splitlines()
    assert [name in head for name in ("ours", "eager")] == [True, True]
    assert "2.0e-07 | 3.0e-03" in lines[1]


def test_rows_of_the_readme_are_the_newest():
    lines = {line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| fused_")}
    measured = rows.read()
    assert lines
    assert lines <= {*report.table(measured).splitlines(), *report.unmeasured(measured).splitlines()}


def test_plots_show_losses_and_what_bounds_them(tmp_path):
    sizes = [
        {"operator": "fused_itc_loss", "case": case, "B": B, "D": 4, "dtype": "float32", **TIMES, **MACHINE}
        for B in (8, 16, 32)
        for case in ("ours", "ours forward", "products")
    ]
    (path,) = report.plots(sizes, tmp_path)
    assert path.stat().st_size > 10_000
