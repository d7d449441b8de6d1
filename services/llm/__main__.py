"""`python -m services.llm`."""

from hiprune.server import main
from services.llm.process import LlmService
from services.llm.settings import Settings

if __name__ == "__main__":
    main(Settings, LlmService)
