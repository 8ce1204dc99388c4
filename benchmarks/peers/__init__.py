"""The same training step by nemo2 and by hand, each behind ``build(case) -> step``."""
