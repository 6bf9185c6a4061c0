"""deltatune: every parameter-efficient fine-tuning method as small exact parts. Train the delta, not the model."""

import importlib as _importlib

from .core.adapter import WRITERS as _WRITERS
from .core.adapter import Adapter as Adapter
from .core.adapter import adapters as adapters
from .core.attach import CONFIGS as _CONFIGS
from .core.attach import READERS as _READERS
from .core.attach import attach as attach
from .core.attach import load as load
from .core.compose import Average as Average
from .core.compose import Stack as Stack
from .core.compose import Sum as Sum
from .core.method import Method as Method
from .core.method import bank as bank
from .core.method import fixed as fixed
from .core.method import param as param
from .core.runtime import INTEGRATIONS as _INTEGRATIONS
from .core.schedule import Schedule as Schedule
from .core.schedule import Schedules as Schedules
from .core.site import Site as Site
from .core.site import sites as sites
from .methods.adaptive import APT as APT
from .methods.baseline import Copy as Copy
from .methods.baseline import Full as Full
from .methods.baseline import Head as Head
from .methods.bias import BitFit as BitFit
from .methods.bottleneck import Parallel as Parallel
from .methods.bottleneck import Residual as Residual
from .methods.bottleneck import Sequential as Sequential
from .methods.conditional import Coda as Coda
from .methods.context import TinyAttention as TinyAttention
from .methods.decomposed import DePT as DePT
from .methods.drop import AdapterDrop as AdapterDrop
from .methods.hybrid import adaptformer as adaptformer
from .methods.hybrid import hadamard as hadamard
from .methods.hybrid import mam as mam
from .methods.hybrid import p_tuning_v2 as p_tuning_v2
from .methods.hybrid import pfeiffer as pfeiffer
from .methods.hyper import HyperFormer as HyperFormer
from .methods.hyper import HyperFormerPlus as HyperFormerPlus
from .methods.instance import ATTEMPT as ATTEMPT
from .methods.instance import IDPG as IDPG
from .methods.language import Invertible as Invertible
from .methods.language import bad_x as bad_x
from .methods.language import mad_x as mad_x
from .methods.lora import DoRA as DoRA
from .methods.lora import LoRA as LoRA
from .methods.mask import ChildTuningD as ChildTuningD
from .methods.mask import ChildTuningF as ChildTuningF
from .methods.prefix import PrefixTuning as PrefixTuning
from .methods.prompt import MPT as MPT
from .methods.prompt import PromptTuning as PromptTuning
from .methods.prompt import PTuning as PTuning
from .methods.prompt import PTuningMLP as PTuningMLP
from .methods.ranks import AdaLoRA as AdaLoRA
from .methods.rescale import IA3 as IA3
from .methods.rescale import SSF as SSF
from .methods.rescale import Hadamard as Hadamard
from .methods.rows import TokenRows as TokenRows
from .methods.side import LST as LST
from .methods.side import AttentionFusion as AttentionFusion
from .methods.special import PASTA as PASTA
from .methods.transfer import adapter_soup as adapter_soup
from .methods.transfer import mera as mera
from .methods.transfer import spot as spot
from .methods.unified import ProPELTAdapter as ProPELTAdapter
from .methods.unified import ProPELTLoRA as ProPELTLoRA
from .methods.unified import ProPELTPrefix as ProPELTPrefix
from .methods.vision import VPT as VPT
from .methods.words import InsertedPrompt as InsertedPrompt
from .methods.words import Verbaliser as Verbaliser
from .methods.words import warp as warp
from .methods.xprompt import XPrompt as XPrompt
from .version import VERSION as __version__

_INTEGRATIONS["transformers"] = lambda: _importlib.import_module("deltatune.hf").install()
_INTEGRATIONS["transformers.trainer"] = lambda: _importlib.import_module("deltatune.hf").install_trainer()
_CONFIGS["peft"] = lambda *args, **kwargs: _importlib.import_module("deltatune.peft").attach(*args, **kwargs)
_READERS["adapter_config.json"] = lambda *args, **kwargs: _importlib.import_module("deltatune.peft").load(
    *args, **kwargs
)
_WRITERS["peft"] = lambda *args, **kwargs: _importlib.import_module("deltatune.peft").save(*args, **kwargs)
