"""The folder that MNN's own LLM engine runs, the engine inside its Android and iOS apps."""
