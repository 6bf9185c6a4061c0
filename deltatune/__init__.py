"""deltatune: every parameter-efficient fine-tuning method as small exact parts. Train the delta, not the model."""

import importlib as _importlib

from .core.adapter import Adapter as Adapter
from .core.adapter import adapters as adapters
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
from .methods.baseline import Copy as Copy
from .methods.baseline import Full as Full
from .methods.baseline import Head as Head
from .methods.bias import BitFit as BitFit
from .methods.bottleneck import Sequential as Sequential
from .methods.lora import LoRA as LoRA
from .methods.prefix import PrefixTuning as PrefixTuning
from .methods.prompt import PromptTuning as PromptTuning
from .methods.rescale import IA3 as IA3
from .version import VERSION as __version__

_INTEGRATIONS["transformers"] = lambda: _importlib.import_module("deltatune.hf").install()
_INTEGRATIONS["transformers.trainer"] = lambda: _importlib.import_module("deltatune.hf").install_trainer()
