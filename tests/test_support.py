"""A notebook's outputs are read whole, however the kernel sent them."""

from nbformat import v4
from support import outputs, printed


def test_what_arrives_in_pieces_is_read_as_one():
    pieces = [("stdout", '{"a": 1}'), ("stderr", "a warn"), ("stdout", "\n"), ("stderr", "ing\n")]
    streams = [v4.new_output("stream", name=name, text=text) for name, text in pieces]
    value = v4.new_output("execute_result", data={"text/plain": "3"})
    cell = v4.new_code_cell(outputs=[*streams[:2], value, *streams[2:]])
    assert printed(cell) == '{"a": 1}\n'
    assert [output.get("text") for output in outputs(cell)] == ['{"a": 1}\n', "a warning\n", None]
    assert printed(v4.new_code_cell()) == ""
