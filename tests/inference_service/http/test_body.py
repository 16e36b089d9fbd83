"""Bodies that are wrong in millions of places."""

import pytest
from pydantic import ValidationError

from inference_service.http.completions import CompletionRequest


@pytest.mark.parametrize("value", ["[1.5,1.5,1.5]", "[[1.5],[1.5],[1.5]]", "[[1.5,1.5,1.5]]", '[[1],"x",{}]'])
def test_only_the_first_wrong_value_of_a_list_makes_an_error(value: str) -> None:
    with pytest.raises(ValidationError) as raised:
        CompletionRequest.model_validate_json(f'{{"prompt": {value}}}')
    # One for each type that a prompt may have.
    assert raised.value.error_count() == 4
