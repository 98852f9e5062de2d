// Stands in for MLX's logging.h, whose os_log has members qualified by address space.
#pragma once

namespace mlx {
struct os_log {
  template <class... Arguments>
  constexpr os_log(Arguments...) {}
  template <class... Arguments>
  void log_debug(Arguments...) const {}
};
}  // namespace mlx
