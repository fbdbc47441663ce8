"""test_parti.py and test_hpsv2.py are programs, not tests, in spite of their names."""

collect_ignore = ["test_parti.py", "test_hpsv2.py"]
