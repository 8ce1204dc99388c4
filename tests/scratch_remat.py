import pytest, torch
from tests.test_remat import *
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("i", range(len(TWO)))
def test_one(pool, i, kind):
    m,mesh,o=TWO[i]
    assert pool.run(2, verified, [(m,mesh,{**o,"remat":kind})], "cpu")[0]==[]
