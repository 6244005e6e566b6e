"""The ecosystem's folders (diffusers layout) and ours, both ways, without importing diffusers or transformers."""
