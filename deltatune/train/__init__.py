"""Training: transformers' Trainer with the adapters' schedules, backbones, texts as batches, several tasks at once."""

from .multitask import Heads as Heads
from .multitask import JointCollate as JointCollate
from .multitask import TaskHead as TaskHead
from .multitask import add_heads as add_heads
from .multitask import evaluate as evaluate
from .multitask import heads_of as heads_of
from .multitask import joint_rows as joint_rows
from .multitask import load_joint as load_joint
from .multitask import mixed as mixed
from .multitask import predict_tasks as predict_tasks
from .multitask import read_tasks as read_tasks
from .multitask import save_joint as save_joint
from .multitask import shares as shares
