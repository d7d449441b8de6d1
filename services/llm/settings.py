"""Settings of the language-model service; see `hiprune.config` for those that every service has."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, SecretStr

from hiprune.config import ServiceSettings


class Settings(ServiceSettings):
    """The language model: pruned tokens in, text out; and the front door, AskImage."""

    env_prefix: ClassVar[str] = "HIPRUNE_LLM_"
    service: ClassVar[str] = "llm"
    next_hop: ClassVar[str] = "pruner"

    listen: Annotated[str, Field(pattern=r"^(unix:.+|.+:\d+)$")] = Field(
        "127.0.0.1:50053", description="address to serve on: HOST:PORT or unix:PATH"
    )
    pruner: Annotated[str, Field(pattern=r"^(unix:.+|.+:\d+)$")] = Field(
        "127.0.0.1:50052", description="address of the pruner: HOST:PORT or unix:PATH"
    )
    model_name: Annotated[str, Field(max_length=200)] = Field(
        "", description="name that clients may give as `model`; empty: the hub id or the directory's name"
    )
    engine: Literal["transformers", "vllm", "vllm-http"] = Field(
        "transformers",
        description="what runs the model: transformers, in this process; vllm, in processes of its own; "
        "vllm-http, a vLLM server elsewhere",
    )
    url: Annotated[str, Field(pattern=r"^(https?://[^/@]+(/.*)?)?$")] = Field(
        "", description="address of the vLLM server, http://HOST:PORT; vllm-http alone"
    )
    url_key: SecretStr = Field(SecretStr(""), description="the vLLM server's API key; vllm-http alone")
    tensor_parallel_size: int = Field(1, ge=1, le=1024, description="GPUs that share each layer; vllm alone")
    pipeline_parallel_size: int = Field(
        1, ge=1, le=1024, description="groups of GPUs that share the layers; vllm alone"
    )
    distributed_executor_backend: Literal["", "mp", "ray", "uni", "external_launcher"] = Field(
        "", description="what starts vLLM's workers: mp, ray, uni or external_launcher; empty: vLLM's choice"
    )
    gpu_memory_utilization: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a GPU's memory: what vLLM takes, and the most that transformers does; 0: "
        "vLLM's own choice, all",
    )
    quantization: Annotated[str, Field(pattern=r"^[a-z0-9_]*$")] = Field(
        "", description="how the language model's weights are quantised, in vLLM's words; empty: as stored"
    )
    lora_adapters: Annotated[str, Field(max_length=100_000)] = Field(
        "",
        description="LoRA adapters that clients may give as `model`, NAME=DIR,NAME=DIR; vllm alone",
    )
    vllm_args: Annotated[str, Field(max_length=10_000)] = Field(
        "", description='more of vLLM\'s arguments: --vllm-args="--max-model-len=8192 --kv-cache-dtype=fp8"'
    )

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto, cpu or cuda; auto takes a GPU where there is one"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto, float32, bfloat16 or float16; auto: float32 on a CPU, the checkpoint's on a GPU",
    )
    newlines: Literal["none", "rows"] = Field(
        "none",
        description="newline embeddings in pruned images of families that tile: none, or rows, "
        "behind each row that keeps a token",
    )
    max_concurrency: int = Field(4, ge=1, le=256, description="answers generated at the same time")
    max_queue: int = Field(
        64, ge=0, le=100_000, description="requests that may wait for a slot; more are refused as OVERLOADED"
    )
    max_new_tokens: int = Field(
        1024, ge=1, le=1_000_000, description="largest sampling.max_tokens, in tokens"
    )
    max_messages: int = Field(128, ge=1, le=100_000, description="most turns of a conversation")
    max_media: int = Field(8, ge=1, le=1000, description="most images of a conversation")
    max_image_bytes: int = Field(
        20 * 2**20, ge=1, le=2**31 - 1, description="largest encoded image, or frame of a video, in bytes"
    )
    max_video_bytes: int = Field(
        64 * 2**20, ge=1, le=2**31 - 1, description="all encoded frames of a video together, in bytes"
    )
    max_text_chars: int = Field(
        32_768, ge=1, le=100_000_000, description="most characters of text in a conversation"
    )

    @property
    def vllm_arguments(self) -> str:
        """All of vLLM's arguments that are set here, as on its command line."""
        given = {
            "tensor-parallel-size": self.tensor_parallel_size if self.tensor_parallel_size > 1 else "",
            "pipeline-parallel-size": self.pipeline_parallel_size if self.pipeline_parallel_size > 1 else "",
            "distributed-executor-backend": self.distributed_executor_backend,
            "gpu-memory-utilization": self.gpu_memory_utilization or "",
            "quantization": self.quantization,
        }
        words = [f"--{name}={value}" for name, value in given.items() if value != ""]
        return " ".join([*words, self.vllm_args]).strip()
