import sys, time, traceback, functools
import torch
T0=time.time()
import reference
dev='cuda'
def say(*a): print(*a,flush=True)
flush=torch.empty(2*60*2**20//4,device=dev)
def spun(f,reps=7,spin=30_000_000):
    f(); f(); ts=[]
    for _ in range(reps):
        flush.zero_(); torch.cuda._sleep(spin)
        a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
        a.record(); f(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
    return sorted(ts)[len(ts)//2]
summary=[]
def prof(label,f,top):
    from torch.profiler import profile, ProfilerActivity
    with profile(activities=[ProfilerActivity.CUDA,ProfilerActivity.CPU]) as p: f(); torch.cuda.synchronize()
    ev=[e for e in p.key_averages() if str(e.device_type).endswith('CUDA') and e.self_device_time_total>0]
    ev.sort(key=lambda e:-e.self_device_time_total)
    say(f'-- {label}: {sum(e.self_device_time_total for e in ev):.0f} us in {sum(e.count for e in ev)} kernels')
    for e in ev[:top]: say(f'   {e.self_device_time_total:7.0f} x{e.count} {e.key[:80]}')
def case(name,make,shapes,masks,auto=True,forward_only=False,top=14,differentiable=None):
    try:
        torch.manual_seed(1); m=make().to(dev)
        with torch.no_grad():
            for n,p in m.named_parameters():
                if n.endswith('routing_token'): p.mul_(.25/p.shape[-1]**.5)
        ins={a:torch.randn(s,device=dev) for a,s in shapes.items()}
        ms={a:torch.ones(s,dtype=torch.bool,device=dev) for a,s in masks.items()}
        call=(lambda **k: m(**k,**ms)) if not isinstance(m,reference.CoordinateDescentRouter) else (lambda **k: (lambda r: (r.routed_tokens*r.scores.unsqueeze(-1)))(m(num_tokens=1024,**k)))
        ctx=lambda: torch.autocast('cuda',torch.bfloat16,enabled=auto)
        def fwd():
            with torch.no_grad(),ctx(): return call(**ins)
        y=fwd(); g=torch.randn_like(y)/256; del y
        line=f'CASE {name}: fwd {spun(fwd):.3f}'
        if not forward_only:
            xs={a:t.requires_grad_() for a,t in ins.items()}
            def both():
                with ctx(): y=call(**xs)
                return y.shape,torch.autograd.grad(y,[*xs.values(),*m.parameters()],g)
            line+=f' f+b {spun(both):.3f}'
            torch.cuda.empty_cache(); torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); before=torch.cuda.memory_allocated()
            r=both(); torch.cuda.synchronize(); line+=f' peak {(torch.cuda.max_memory_allocated()-before)/1e6:.0f} MB'
            r2=both(); same=all(torch.equal(a,b) for a,b in zip(r[1],r2[1])); line+=f' same bits {same}'; del r,r2
        summary.append(line); say(line,f'{time.time()-T0:.0f}s')
        if top:
            prof(name+' fwd',fwd,top)
            if not forward_only: prof(name+' f+b',both,top+8)
    except Exception as e:
        summary.append(f'FAILED {name} {e!r:.200}'); say(summary[-1]); say('\n'.join(t[:160] for t in traceback.format_exc().strip().splitlines()[-8:]))
    m=ins=ms=call=None
    torch.cuda.empty_cache()
from suites import layers
for kind in ('feed_forward','attention','block','image','cross_attention'):
    spec=layers.LAYERS[kind]('document')
    case(kind,lambda: spec.make(reference,True),spec.inputs,spec.masks,auto=kind!='cross_attention',top=0 if kind=='block' else 12)
case('router 1M',lambda: reference.CoordinateDescentRouter(512,num_routing_tokens=2,use_triton=True),{'x':(1,1<<20,512)},{},auto=False,top=10)
ar=lambda: reference.ConditionalRoutedAutoregressiveAttention(512,num_heavy_tokens_q=32,num_heavy_tokens_kv=1024,num_routed_kv=2,use_triton=True,use_flash_attn=True)
for b,n in ((2,8192),(2,32768),(1,131072)): case(f'AR {b}x{n}',ar,{'x':(b,n,512)},{},top=16 if n<131072 else 0)
case('AR 1x1M fwd',ar,{'x':(1,1<<20,512)},{},forward_only=True,top=8)
say(torch.cuda.get_device_name())
for s in summary: say(s)
