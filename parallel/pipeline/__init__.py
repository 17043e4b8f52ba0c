"""Pipeline parallelism: schedules as data, their checker, and the simulator that times and draws them."""
