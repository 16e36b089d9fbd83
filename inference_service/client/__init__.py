"""The Python clients of the inference service. They import nothing of the server.

This package re-exports its names because programs of other people import from it; no other package does.
"""

from inference_service.client.admin_client import AdminClient as AdminClient
from inference_service.client.client import AsyncInferenceClient as AsyncInferenceClient
from inference_service.client.client import InferenceClient as InferenceClient
from shared.service.access.credentials import Credentials as Credentials
