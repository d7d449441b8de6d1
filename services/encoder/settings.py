"""Settings of the encoder. Read once at start; see `hiprune.config` for where values come from."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from hiprune.config import ServiceSettings
from hiprune.intake import ROOM


class Settings(ServiceSettings):
    """The vision encoder: pixels in, visual tokens and layer attention out."""

    env_prefix: ClassVar[str] = "HIPRUNE_ENCODER_"
    service: ClassVar[str] = "encoder"
    peers_wanted: ClassVar[bool] = True

    listen: Annotated[str, Field(pattern=r"^(unix:.+|.+:\d+)$")] = Field(
        "127.0.0.1:50051", description="address to serve on: HOST:PORT or unix:PATH"
    )
    paired_model: str = Field(
        "",
        description="directory or hub id of the CLIP paired with the vision tower; empty: a clip directory "
        "beside the model, else the family's; none: no aligned tokens",
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        "auto", description="where the tower runs: auto, cpu, cuda or cuda:N"
    )
    dtype: Annotated[str, Field(pattern=r"^(auto|float32|bfloat16|float16)$")] = Field(
        "auto", description="the tower's type: auto is float32 on a CPU and bfloat16 on a GPU"
    )
    gpu_memory_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="most of a GPU's memory that the tower takes, as a share of it; 0: all",
    )
    max_image_bytes: int = Field(
        20 * 2**20, ge=1, le=2**31 - 1, description="largest encoded image, or frame of a video, in bytes"
    )
    max_image_pixels: int = Field(
        50_000_000, ge=1, le=2**31 - 1, description="largest image, in pixels of its header"
    )
    max_image_side: int = Field(16_384, ge=1, le=2**31 - 1, description="longest side of an image, in pixels")
    max_frames: int = Field(64, ge=1, le=4096, description="most frames of one video")
    max_video_bytes: int = Field(
        64 * 2**20, ge=1, le=2**31 - 1, description="all encoded frames of a video together, in bytes"
    )
    max_video_pixels: int = Field(
        150_000_000, ge=1, le=2**40, description="all frames of a video together, in pixels of their headers"
    )
    max_item_patches: int = Field(
        64 * 1024,
        ge=1,
        le=2**31 - 1,
        description="most patches of one image or video, which bound the memory of its forward",
    )
    max_batch_patches: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="most patches in one forward, a larger image running alone; 0: 1152, or 16384 on a GPU",
    )
    max_queue_patches: int = Field(
        64 * 1024, ge=1, le=2**31 - 1, description="most patches waiting; more are refused as overload"
    )
    max_wait_ms: float = Field(
        2.0, ge=0, le=1000, description="how long an idle encoder waits for company, in milliseconds"
    )
    max_decoding: int = Field(
        256, ge=1, le=65_536, description="most images being decoded or waiting for it; more are overload"
    )
    decode_threads: int = Field(2, ge=1, le=256, description="threads that decode and resize images")
    shared_memory_dir: Annotated[str, Field(pattern=r"^(/.+)?$")] = Field(
        "/dev/shm",  # noqa: S108  # every file in it is created exclusively, for one user
        description="directory in memory through which large answers go to a pruner on the Unix socket that "
        "has the same one; empty: off",
    )
    shared_memory_min_bytes: int = Field(
        2**20, ge=1, le=2**31 - 1, description="smallest answer that goes through shared memory, in bytes"
    )
    shared_memory_bytes: int = Field(
        512 * 2**20,
        ge=0,
        le=2**40,
        description="most shared memory that waits for a pruner to take it, in bytes; more goes inline",
    )

    @property
    def max_request_bytes(self) -> int:
        """One image or video, and what is said about it."""
        return min(self.max_message_bytes, max(self.max_image_bytes, self.max_video_bytes) + ROOM)
