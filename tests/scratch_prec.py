import pytest, torch, nemo2
from nemo2 import Pipeline
from tests.models import *
P=Pipeline
CELLS=[
 ("gpt tied",{"dp":1},{}),
 ("gpt tied",{"dp":2},{"pipeline":P(2)}),
 ("gpt tied",{"dp":2},{"data_parallel":"ddp","pipeline":P(2)}),
 ("skip glue",{"dp":2},{"data_parallel":"zero1","pipeline":P(4)}),
 ("gpt tied",{"tp":2},{}),
 ("llama",{"tp":2},{"pipeline":P(2)}),
 ("gpt tied",{"pp":2},{"pipeline":P(2)}),
 ("skip glue",{"pp":2},{"pipeline":P(2)}),
 ("example gpt",{"cp":2},{}),
 ("example gpt",{"cp":2},{"context_parallel":"ulysses"}),
 ("example gpt",{"cp":2},{"context_parallel":"all_gather", "data_parallel":"ddp"}),
 ("skip glue",{"dp":2},{"data_parallel":nemo2.DataParallel("fsdp",reshard=True),"pipeline":P(2),"remat":"full"}),
 ("encoder",{"tp":2},{}),
]
def verified(cell):
    m,mesh,o=cell
    case=ZOO[m]
    def build():
        mod=case()
        if hasattr(mod,"config"): mod.config.use_cache=False
        return mod
    r=nemo2.verify(build,token_ids(8,9),case.loss,mesh,dtype=torch.float32,precision="bf16",rules=case.rules,**o)
    worst=max(x.error/x.bound for x in (r.loss,r.norm,*r.gradients,*r.weights))
    return r.ok, worst, str(r), r.loss.error/r.loss.size
@pytest.mark.parametrize("i",range(len(CELLS)))
def test_one(pool,i):
    import math
    world=math.prod(CELLS[i][1].values())
    ok,worst,text,l=pool.run(world,verified,CELLS[i])[0]
    print(CELLS[i],"WORST",worst,"loss",l)
    assert ok,text
