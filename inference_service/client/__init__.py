"""Python clients of the inference service. They import nothing of the server.

The only package that people import from, so the only one that re-exports names.
"""

from inference_service.client.admin_client import AdminClient as AdminClient
from inference_service.client.client import AsyncInferenceClient as AsyncInferenceClient
from inference_service.client.client import InferenceClient as InferenceClient
