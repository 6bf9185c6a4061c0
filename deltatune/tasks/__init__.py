"""Tasks: examples, splits, labels, a metric, a licence. They know text and numbers, never a model."""

from deltatune.tasks import glue as glue
from deltatune.tasks import stdlib_docs as stdlib_docs
from deltatune.tasks.metrics import METRICS as METRICS
from deltatune.tasks.task import Kind as Kind
from deltatune.tasks.task import Split as Split
from deltatune.tasks.task import Task as Task
from deltatune.tasks.task import register as register
from deltatune.tasks.task import task as task
from deltatune.tasks.task import tasks as tasks
