"""The service that operators call: it lists versions, and changes which one serves."""

from typing import Any

from inference_service.draft import check_number
from inference_service.grpc.translate import readable, status_to_pb
from inference_service.versions.catalogue import Catalogue
from inference_service.versions.manager import VersionManager
from inference_service.versions.planner import State
from shared.errors import NotFound
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc


class AdminServicer(inference_pb2_grpc.ModelAdminServiceServicer):
    """`ModelAdminService`. Belongs to the event loop."""

    def __init__(self, catalogue: Catalogue, versions: VersionManager) -> None:
        self._catalogue = catalogue
        self._versions = versions

    async def ListVersions(self, message: pb.ListVersionsRequest, context: Any) -> pb.ListVersionsResponse:  # noqa: N802
        """Returns every version in the registry, and the policy."""
        statuses = await self._versions.statuses()
        return pb.ListVersionsResponse(
            versions=[status_to_pb(status) for status in statuses],
            policy=self._catalogue.policy,
            notices=map(readable, self._catalogue.notices),
            best_by=f"BEST_BY_{self._catalogue.best_by.name}",
        )

    async def LoadVersion(self, message: pb.LoadVersionRequest, context: Any) -> pb.LoadVersionResponse:  # noqa: N802
        """Returns when the version is in memory."""
        await self._versions.load(check_number(message.version))
        return pb.LoadVersionResponse(version=await self._status(message.version))

    async def UnloadVersion(self, message: pb.UnloadVersionRequest, context: Any) -> pb.UnloadVersionResponse:  # noqa: N802
        """Returns at once, whether or not streams still run on the version."""
        await self._versions.unload(check_number(message.version))
        return pb.UnloadVersionResponse(version=await self._status(message.version))

    async def PromoteVersion(  # noqa: N802
        self, message: pb.PromoteVersionRequest, context: Any
    ) -> pb.PromoteVersionResponse:
        """Returns when the label is written."""
        await self._versions.promote(check_number(message.version))
        return pb.PromoteVersionResponse(version=await self._status(message.version))

    async def SetPolicy(self, message: pb.SetPolicyRequest, context: Any) -> pb.SetPolicyResponse:  # noqa: N802
        """Returns when the policy is written; its version may still have to be loaded."""
        await self._versions.set_policy(message.label)
        statuses = await self._versions.statuses()
        serving = next((status_to_pb(one) for one in statuses if one.state is State.SERVING), None)
        return pb.SetPolicyResponse(serving=serving)

    async def RollBack(self, message: pb.RollBackRequest, context: Any) -> pb.RollBackResponse:  # noqa: N802
        """Returns when the other version serves."""
        number = check_number(message.version) if message.HasField("version") else None
        return pb.RollBackResponse(version=await self._status(await self._versions.roll_back(number)))

    async def _status(self, number: int) -> pb.VersionStatus:
        for status in await self._versions.statuses():
            if status.number == number:
                return status_to_pb(status)
        raise NotFound(f"Version {number} was removed from the registry.")
