// The environment variables of HCCL that have a meaning here.
#pragma once

#include <chrono>
#include <cstdint>

namespace host_runtime::hccl {

/// How long a rank waits for the others to join: HCCL_CONNECT_TIMEOUT, an integer in [120, 7200], default
/// 120, plus the 20 s that HCCL adds. NPU_COMPILER_HCCL_CONNECT_SECONDS (host runtime only) replaces the
/// whole wait, without bounds. Throws Error(HCCL_E_PARA) for another value.
std::chrono::seconds connect_timeout();

/// How long a collective waits for its peers: HCCL_EXEC_TIMEOUT, seconds in [0, 2147483647], default 1836, 0
/// for ever. Throws Error(HCCL_E_PARA) for another value.
std::chrono::seconds exec_timeout();

/// Bytes of a communicator's buffer: HCCL_BUFFSIZE, MiB, at least 1, default 200. Throws Error(HCCL_E_PARA)
/// for another value.
uint64_t buffer_bytes();

}  // namespace host_runtime::hccl
