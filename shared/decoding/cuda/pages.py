"""Memory for keys and values on an NVIDIA GPU, in pages that several slots and cached prefixes can share."""

from shared.device.cuda_driver import Gpu

# Pages are taken from pieces of at least this size, since a GPU gives memory in whole megabytes.
_PIECE_BYTES = 32 << 20


class Page:
    """Keys and values of all layers at consecutive positions. Its memory is free again when nobody refers to it."""

    def __init__(self, address: int, free: list[int]) -> None:
        self.address = address
        self._shared = False
        self._free = free

    @property
    def shared(self) -> bool:
        """Whether several slots or blocks may refer to it, so that nobody may write to it."""
        return self._shared

    def share(self) -> None:
        """Says that several slots or blocks may refer to it from now on."""
        self._shared = True

    def __del__(self) -> None:
        self._free.append(self.address)


class PagePool:
    """Grows with the most pages that were in use at a time. Belongs to one thread."""

    def __init__(self, gpu: Gpu, page_bytes: int) -> None:
        self._gpu = gpu
        self.page_bytes = page_bytes
        self._pages_per_piece = max(1, _PIECE_BYTES // page_bytes)
        self._pieces = 0
        self._free: list[int] = []

    @property
    def memory_bytes(self) -> int:
        """The memory of all pages, used or free."""
        return self._pieces * self._pages_per_piece * self.page_bytes

    def take(self) -> Page:
        """Returns a page that nobody uses, which holds numbers of an earlier use, or zeros.

        Raises `CudaError` if the GPU has too little memory.
        """
        if not self._free:
            piece = self._gpu.allocate(self._pages_per_piece * self.page_bytes)
            self._pieces += 1
            self._free += [piece + number * self.page_bytes for number in reversed(range(self._pages_per_piece))]
        return Page(self._free.pop(), self._free)

    def copy_of(self, page: Page) -> Page:
        """Returns a page with the content of another one."""
        copied = self.take()
        self._gpu.copy(copied.address, page.address, self.page_bytes)
        return copied
