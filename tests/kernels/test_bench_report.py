from bench import gpu, report, rows

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
