"""pytest collects the tests only: the other files are programs of the kit, which runs without pytest."""

collect_ignore = ["checks.py", "kit.py", "make_kit.py", "receiver.py", "second_rank.py", "stand_ins.py"]
