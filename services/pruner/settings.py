"""Settings of the pruner. Read once at start; see `hiprune.config` for where values come from."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, SecretStr, model_validator

from hiprune.config import ServiceSettings


class Settings(ServiceSettings):
    """The pruner: which visual tokens to keep, and the cache of encoded and pruned images."""

    env_prefix: ClassVar[str] = "HIPRUNE_PRUNER_"
    service: ClassVar[str] = "pruner"
    peers_wanted: ClassVar[bool] = True
    next_hop: ClassVar[str] = "encoder"

    listen: Annotated[str, Field(pattern=r"^(unix:.+|.+:\d+)$")] = Field(
        "127.0.0.1:50052", description="address to serve on: HOST:PORT or unix:PATH"
    )
    encoder: Annotated[str, Field(pattern=r"^(unix:.+|.+:\d+)$")] = Field(
        "127.0.0.1:50051", description="address of the encoder: HOST:PORT or unix:PATH"
    )
    paired_model: str = Field(
        "",
        description="directory or hub id of the CLIP paired with the vision tower; empty: a clip directory "
        "beside the model, else the family's; none: no text similarity",
    )
    max_image_bytes: int = Field(
        20 * 2**20, ge=1, le=2**31 - 1, description="largest encoded image, or frame of a video, in bytes"
    )
    max_frames: int = Field(64, ge=1, le=4096, description="most frames of one video")
    max_video_bytes: int = Field(
        64 * 2**20, ge=1, le=2**31 - 1, description="all encoded frames of a video together, in bytes"
    )
    max_text_chars: int = Field(32_768, ge=1, le=10_000_000, description="longest question, in characters")
    max_text_chunks: int = Field(
        16,
        ge=1,
        le=4096,
        description="longest question for the paired text encoder, in chunks of what it reads at a time, 75 "
        "tokens for CLIP; with CLIP-L each takes about 0.16 s of a CPU core",
    )
    max_views: int = Field(256, ge=1, le=65_536, description="most views in one PruneTokens request")
    max_tokens: int = Field(
        262_144, ge=1, le=2**31 - 1, description="most tokens in a PruneTokens request, over all its views"
    )
    cache: Annotated[str, Field(pattern=r"^(memory|redis|off)$")] = Field(
        "memory", description="where encoded and pruned images are cached: memory, redis or off"
    )
    cache_bytes: int = Field(
        512 * 2**20, ge=0, le=2**40, description="size of the in-process cache, in bytes"
    )
    cache_tenant_bytes: int = Field(
        256 * 2**20,
        ge=1,
        le=2**40,
        description="most that one tenant's entries take up in either cache, in bytes; its least recently "
        "used go first",
    )
    cache_ttl_s: int = Field(
        3600, ge=1, le=30 * 86_400, description="time after which a cached image is forgotten, in seconds"
    )
    cache_value_bytes: int = Field(
        96 * 2**20,
        ge=1,
        le=2**29,
        description="largest single cache entry, in bytes; larger ones are not cached",
    )
    cache_timeout_ms: int = Field(
        50,
        ge=1,
        le=10_000,
        description="time for one cache operation before it counts as a miss, in milliseconds; an entry is "
        "read in operations of 2 MiB",
    )
    cache_secret: SecretStr = Field(
        SecretStr(""),
        description="secret shared by all pruners of one Redis, at least 16 characters; required with redis",
    )
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="URL of the Redis; may hold a password: redis://, rediss:// (TLS), unix://, "
        "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE or redis+cluster://HOST:PORT,HOST:PORT",
    )

    shared_memory_dir: Annotated[str, Field(pattern=r"^(/.+)?$")] = Field(
        "/dev/shm",  # noqa: S108  # only the encoder's own files in it are read
        description="directory in memory in which an encoder on a Unix socket may leave large answers: the "
        "encoder's; empty: off",
    )

    @model_validator(mode="after")
    def _redis_needs_a_secret(self) -> Self:
        secret = self.cache_secret.get_secret_value()
        if self.cache == "redis" and len(secret) < 16:
            raise ValueError(
                "cache_secret (--cache-secret, HIPRUNE_PRUNER_CACHE_SECRET): "
                f"{len(secret)} characters, expected at least 16 when cache is redis"
            )
        return self
