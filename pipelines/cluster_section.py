"""The `cluster:` section of a job file: what of a Kubernetes cluster a submitted job gets. Changes no row."""

from __future__ import annotations

import posixpath
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

QUANTITY = re.compile(r"(\d+(?:\.\d*)?)(m|[kMGTPE]|[KMGTPE]i)?", re.ASCII)
UNITS = {"m": 0.001, "": 1.0, "k": 1e3} | {unit: 1000.0 ** (i + 2) for i, unit in enumerate("MGTPE")}
UNITS |= {f"{unit}i": 1024.0 ** (i + 1) for i, unit in enumerate("KMGTPE")}

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
"""Of an object in Kubernetes."""
Label = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
LabelKey = Annotated[
    str,
    StringConstraints(
        pattern=r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
    ),
]
LabelValue = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")]
"""Of a node. The API server takes any text here; the pod of a wrong one is never made."""

Path = Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9._/-]+$")]
Seconds = Annotated[int, Field(ge=1, le=366 * 86400)]

# Label and value of a spot node, and whether it is tainted with them.
SPOT: dict[str, tuple[str, str, bool]] = {
    "gke": ("cloud.google.com/gke-spot", "true", True),
    "eks": ("eks.amazonaws.com/capacityType", "SPOT", False),
    "karpenter": ("karpenter.sh/capacity-type", "spot", False),
    "aks": ("kubernetes.azure.com/scalesetpriority", "spot", True),
}

SECRET_NAME = re.compile(
    r"secret|token(?!iz)|passw|passphrase|credential|connection_?string|authorization|cookie|(^|_)key$|key_id$|(^|_)sas$",
    re.IGNORECASE,
)
LOGIN = re.compile(r"://[^/@\s]*:[^/@\s]+@")
"""In an address: its user and password."""

NO_SECRETS = ("", "anon", "cloud", "google_default")
"""What gcsfs takes in the place of a token."""


def spells_secret(name: str, value: str) -> bool:
    """Whether a setting seems to hold a secret; a path to a mounted one is none."""
    if LOGIN.search(value):
        return True
    is_path = value.startswith("/") and name.upper().endswith(("_FILE", "GOOGLE_APPLICATION_CREDENTIALS"))
    return SECRET_NAME.search(name) is not None and value not in NO_SECRETS and not is_path


def amount(quantity: str) -> float:
    """A Kubernetes quantity as a number: "500m" → 0.5, "1Gi" → 1073741824."""
    found = QUANTITY.fullmatch(quantity)
    assert found is not None
    return float(found[1]) * UNITS[found[2] or ""]


class Part(BaseModel):
    """Base of every part of the section."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Toleration(Part):
    """As in a pod."""

    key: LabelKey | None = None
    operator: Literal["Exists", "Equal"] | None = Field(None, description="Equal where a value is given, else Exists")
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _operator(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("operator") is None:
            return {**data, "operator": "Exists" if data.get("value") is None else "Equal"}
        return data

    @model_validator(mode="after")
    def _fits(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError(f"value: Exists takes none; got {self.value!r}; leave it out, or operator")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("key: missing; Equal needs one")
        return self


class Pods(Part):
    """What one kind of pod asks for, and where it may run."""

    cpus: str = Field("2", description="of one pod, as Kubernetes writes it: 8, 500m")
    memory: str = Field("8Gi", description="of one pod: 32Gi")
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict, description="labels that a node must have")
    tolerations: list[Toleration] = Field(default_factory=list, description="taints that a node may have")

    @field_validator("cpus", "memory", mode="before")
    @classmethod
    def _quantity(cls, value: Any) -> Any:
        text = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        if not isinstance(text, str) or not QUANTITY.fullmatch(text) or amount(text) <= 0:
            raise ValueError(f"got {str(value)[:40]!r}; a quantity such as 500m, 2 or 32Gi")
        return text

    @model_validator(mode="after")
    def _enough(self) -> Pods:
        if amount(self.memory) < 1 << 30:
            raise ValueError(f"memory: {self.memory} is less than Ray itself takes; 1Gi at least")
        return self


class Workers(Pods):
    """A group of equal pods that do the work."""

    name: Label = "workers"
    cpus: str = "4"
    memory: str = "16Gi"
    gpus: int | None = Field(None, ge=0, le=16, description="of one pod; what a stage's worker needs, if left out")
    gpu_resource: LabelKey = Field("nvidia.com/gpu", description="what the cluster calls a GPU")
    replicas: int = Field(1, ge=1, le=10_000, description="pods that the job starts with, and at most has")
    min_replicas: int | None = Field(
        None, ge=0, description="how many stay when they have nothing to do; all of them, if left out"
    )
    labels: dict[Label, str] = Field(
        default_factory=dict, description="of the pods as Ray knows them, for `labels` of a stage"
    )
    spot: Literal["gke", "eks", "karpenter", "aks"] | None = Field(
        None, description="run on spot nodes of this kind; the head keeps off them"
    )

    @model_validator(mode="after")
    def _range(self) -> Workers:
        if self.min_replicas is not None and self.min_replicas > self.replicas:
            raise ValueError(f"min_replicas: {self.min_replicas} is more than replicas, {self.replicas}")
        return self


class Volume(Part):
    """A claim or a secret that all pods see."""

    path: Path = Field(description="where the pods see it")
    claim: Name | None = Field(None, description="of a PersistentVolumeClaim; ReadWriteMany, if the output lies on it")
    secret: Name | None = Field(None, description="of a Secret, whose entries become files")
    read_only: bool = False

    @model_validator(mode="after")
    def _one(self) -> Volume:
        if (self.claim is None) == (self.secret is None):
            raise ValueError("give either claim or secret")
        return self


class ModelCache(Part):
    """A claim that holds downloaded models, as Hugging Face's cache lays them out."""

    claim: Name
    path: Path = "/models"
    offline: bool = Field(True, description="never ask the hub; the claim is then mounted read-only")


class Cluster(Part):
    """What a submitted job gets of a Kubernetes cluster with KubeRay."""

    image: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")] | None = Field(
        None, description="with ldm-batch in it, best by digest: registry/ldm-batch@sha256:…; needed to submit"
    )
    image_pull_secrets: list[Name] = Field(default_factory=list, description="names of Secrets to pull the image with")
    namespace: Label | None = Field(None, description="that of the kubeconfig's context, if left out")
    service_account: Name | None = Field(None, description="of the pods, such as one bound to a cloud's role")
    ray_version: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$")] | None = Field(
        None, description="of the image; the one installed here, if left out"
    )
    head: Pods = Field(default_factory=lambda: Pods(), description="plans and drives; computes nothing")
    workers: Annotated[list[Workers], Field(min_length=1, max_length=16)] = Field(
        default_factory=lambda: [Workers()], description="groups of pods"
    )
    env: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(
        default_factory=dict, description="environment of all pods; secrets go into secrets"
    )
    secrets: list[Name] = Field(
        default_factory=list, description="names of Secrets whose entries become environment variables of all pods"
    )
    volumes: list[Volume] = Field(default_factory=list, description="claims and Secrets that all pods see as folders")
    model_cache: ModelCache | None = Field(None, description="a claim with downloaded models")
    queue: Label | None = Field(None, description="a LocalQueue of Kueue's; the job then waits until it is admitted")
    priority_class: Name | None = Field(None, description="of the pods")
    retries: int = Field(
        3, ge=0, le=100, description="new clusters after one that failed; each goes on where the last one stopped"
    )
    deadline_s: Seconds | None = Field(7 * 86400, description="an attempt is ended after it, and the job with it")
    start_deadline_s: Seconds | None = Field(3600, description="the job fails if it does not run by then")
    ttl_s: int = Field(60, ge=0, le=86400, description="how long the cluster stays when the job has ended")
    grace_s: int = Field(120, ge=0, le=3600, description="that a pod which is told to go may take; more than a shard")
    run_as_user: int = Field(1000, ge=1, description="user id in the pods; that of the image")

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name, said in value.items():
            if spells_secret(name, said):
                raise ValueError(
                    f"the variable {name} looks like a secret; put it into a Secret and name that in secrets"
                )
        return value

    @model_validator(mode="after")
    def _together(self) -> Cluster:
        names = [group.name for group in self.workers]
        if len(set(names)) < len(names):
            raise ValueError(f"workers: {', '.join(names)}: two groups have one name; choose others")
        if self.queue is not None and any(group.min_replicas not in (None, group.replicas) for group in self.workers):
            raise ValueError("workers.min_replicas: Kueue admits a job of fixed size; leave it out, or the queue")
        if self.queue is not None and ("head" in names or len(names) > 7):
            raise ValueError("workers: at most 7 groups under Kueue, none called head")
        mounts = [v.path.rstrip("/") for v in self.volumes]
        mounts += [self.model_cache.path.rstrip("/")] if self.model_cache else []
        if crooked := [m for m in mounts if posixpath.normpath(m) != m]:
            raise ValueError(f"volumes: {crooked[0] or '/'}: no folder of its own; write it without . and .. and //")
        taken = [m for m in mounts if m in ("/dev/shm", "/tmp") or f"{m}/".startswith("/etc/ldm-batch/")]
        if taken or len(set(mounts)) < len(mounts):
            raise ValueError(f"volumes: {(taken or mounts)[0]} is mounted twice; choose another path")
        return self


PARTS: tuple[type[BaseModel], ...] = (Toleration, Workers, Pods, Volume, ModelCache)
