"""Tests of nemo2: pure, fake process group, worker pool, GPU."""
