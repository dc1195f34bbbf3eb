//! The service as its users meet it: the real daemon, its real workers and the real finetunectl, over a private bus with
//! the project's own policy, and over a socket without any bus.

#[path = "service/daemon.rs"]
mod daemon;
#[path = "exactness/fixture.rs"]
#[allow(dead_code, reason = "the fixture of the exactness tests, of which these use a part")]
mod fixture;
#[path = "service/full_disk.rs"]
mod full_disk;
#[path = "service/governed.rs"]
mod governed;
#[path = "service/kills.rs"]
mod kills;
#[path = "service/leases.rs"]
mod leases;
#[path = "service/load.rs"]
mod load;
#[path = "service/night.rs"]
mod night;
#[path = "service/plan.rs"]
mod plan;
#[path = "governor/plant.rs"]
#[allow(dead_code, reason = "the plant of the governor's tests, of which these use a part")]
mod plant;
#[path = "bus_policy/private_bus.rs"]
#[allow(dead_code, reason = "the bus of the policy's tests, of which these use a part")]
mod private_bus;
#[path = "service/queue.rs"]
mod queue;
#[path = "service/runs.rs"]
mod runs;
#[path = "service/suspend.rs"]
mod suspend;
#[path = "boards/tree.rs"]
#[allow(dead_code, reason = "the trees of the sensors' tests, of which these use a part")]
mod tree;
#[path = "service/users.rs"]
mod users;
#[path = "service/world.rs"]
mod world;
