"""pytest collects the tests only: these files are programs that they run, which import each other by their own names."""

collect_ignore = ["failing_ranks.py", "sharded_trainer.py"]
