import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from array import array
from functools import lru_cache
from pathlib import Path

import torch
from .kernels import BLOCK, CHUNK, Cpp, Triton
from .recorder import Unfusable

# %%
FLAGS = '-O3', '-march=native', '-std=c++17', '-fopenmp', '-fno-math-errno', '-fno-trapping-math', '-ffp-contract=off', '-shared', '-fPIC'
KERNELS = {} # every kernel that this process has loaded, by its key

def cache_dir() -> Path:
    "Where kernels are kept: `OPTIMIZERS_EXPLAINED_CACHE`, or a folder in the user's cache; made for its user alone, else `Unfusable`."
    base = os.environ.get('XDG_CACHE_HOME') or Path.home()/'.cache'
    path = Path(os.environ.get('OPTIMIZERS_EXPLAINED_CACHE') or Path(base)/'optimizers_explained')
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
    except OSError as e: raise Unfusable(f'the folder for kernels cannot be used ({e}); set OPTIMIZERS_EXPLAINED_CACHE to one that can') from e
    if hasattr(os, 'getuid') and (info.st_uid != os.getuid() or info.st_mode & 0o077):
        raise Unfusable(f'the folder for kernels, {path}, must belong to you alone (chmod 700), or set OPTIMIZERS_EXPLAINED_CACHE to one that does')
    return path

@lru_cache
def compiler() -> tuple:
    "The C++ compiler (`CXX`, or the first that is found), and what it and the processor say of themselves."
    found = next((c for c in (os.environ.get('CXX'), 'g++', 'c++', 'clang++') if c and shutil.which(c)), None)
    if found is None: raise Unfusable('no C++ compiler was found; install g++, or set CXX')
    version = subprocess.run([found, '--version'], capture_output=True, text=True).stdout
    return found, version + processor()

def processor():
    "What `-march=native` depends on."
    try: lines = Path('/proc/cpuinfo').read_text().split('\n\n')[0].splitlines()
    except OSError: lines = []
    return '\n'.join([platform.machine(), platform.processor(), *(x for x in lines if x.startswith(('model', 'flags', 'Features', 'CPU')))])

# %%
def kept(key, suffix, make):
    "The file in the cache for `key`; if it is not there, `make(path)` writes it under another name first."
    path = cache_dir()/(hashlib.sha256(key.encode()).hexdigest()[:32] + suffix)
    if path.exists(): return path
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
            make(new := Path(tmp)/path.name)
            os.replace(new, path)               # in one stroke: another process sees no file, or all of it
    except OSError as e: raise Unfusable(f'a kernel cannot be written ({e}); set OPTIMIZERS_EXPLAINED_CACHE to a folder where it can') from e
    return path

def load_cpp(
    source:str, # C++
): # the function `run` of it
    "Compile once, ever: the result is kept under a name made of source, compiler, flags and processor."
    cxx, about = compiler()
    key = '\0'.join([source, cxx, about, *FLAGS])
    if key in KERNELS: return KERNELS[key]
    def make(path):
        (file := path.with_suffix('.cpp')).write_text(source)
        done = subprocess.run([cxx, *FLAGS, file, '-o', path], capture_output=True, text=True)
        if done.returncode: raise Unfusable(f'{cxx} could not build it: {done.stderr.strip()[:200]}')
    try: KERNELS[key] = ctypes.CDLL(str(kept(key, '.so', make))).run
    except OSError as e: raise Unfusable(f'a kernel cannot be loaded ({e})') from e
    return KERNELS[key]

def load_triton(
    source:str, # Python
    count:int, # number of its functions
) -> list: # the functions `phase0`, `phase1`, ...
    "Triton reads its functions from a file and keeps what it builds by itself."
    if importlib.util.find_spec('triton') is None: raise Unfusable('Triton is not installed')
    if source not in KERNELS:
        path = kept(source, '.py', lambda path: path.write_text(source))
        spec = importlib.util.spec_from_file_location(f'kernel_{path.stem}', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        KERNELS[source] = [getattr(module, f'phase{i}') for i in range(count)]
    return KERNELS[source]

# %%
class CppKernel:
    "A recording as machine code for the CPU."
    chunk = CHUNK
    def __init__(self,
        recording, # from `record`
        dtype, # of the parameters
    ):
        writer = Cpp(recording, dtype)
        self.source, self.sums = writer.source(), len(writer.sums)
        self.run = load_cpp(self.source)

    def __call__(self,
        pointers, # for each tensor argument an array of addresses
        layout, # of the bucket, with `sizes`, `tensor` and `first`
        coefs, # the numbers of this step
    ):
        "Step all tensors of a bucket."
        address = lambda a: ctypes.c_void_p(a.buffer_info()[0])
        table, coefs = array('q', [p.buffer_info()[0] for p in pointers]), array('d', coefs)
        part, totals = array('d', bytes(8*self.sums*len(layout.tensor))), array('d', bytes(8*self.sums*len(layout.sizes)))
        self.run(address(table), address(layout.sizes), ctypes.c_int64(len(layout.tensor)), address(layout.tensor), address(layout.first), address(coefs),
                 address(part), address(totals), ctypes.c_int64(torch.get_num_threads()))

class TritonKernel:
    "A recording as functions for the GPU; nothing here waits for the device."
    chunk = BLOCK
    def __init__(self,
        recording, # from `record`
        dtype, # of the parameters
    ):
        writer = Triton(recording, dtype)
        self.source, self.sums, self.dtype = writer.source(), [len(ph.sums) for ph in writer.phases], writer.types[dtype]['T']
        self.functions = load_triton(self.source, len(self.sums))

    def __call__(self,
        pointers, # for each tensor argument an array of addresses
        layout, # of the bucket, with `sizes`, `tensor`, `first` and `device`
        coefs, # the numbers of this step
    ):
        "Step all tensors of a bucket."
        up = lambda xs, dtype=torch.int64: torch.tensor(xs, dtype=dtype, pin_memory=layout.device.type == 'cuda').to(layout.device, non_blocking=True)
        if layout.uploaded is None: layout.uploaded = [up(layout.sizes), up(layout.tensor), up(layout.first), up(layout.chunks)]
        sizes, tensor, first, chunks = layout.uploaded
        part, totals = (torch.zeros(n, sum(self.sums), dtype=getattr(torch, self.dtype), device=layout.device) for n in (len(tensor), len(sizes)))
        args, coefs = up([list(p) for p in pointers]), up(coefs, torch.float64)
        for function, sums in zip(self.functions, self.sums):
            function[(len(tensor),)](args, len(sizes), sizes, tensor, first, coefs, part, totals, BLOCK=BLOCK)
            if sums: totals.copy_(torch.segment_reduce(part, 'sum', lengths=chunks, axis=0, initial=0))
