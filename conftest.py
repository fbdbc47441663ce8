"""The benchmark programs bear names of tests and are none."""

collect_ignore = ["test_parti.py", "test_hpsv2.py"]
