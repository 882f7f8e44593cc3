# How the two tools are built from llama.cpp's own tree, which is not touched: 3 and a half minutes on two cores instead
# of 11, at the same speed afterwards. Copied into the cache as CMakeLists.txt; LLAMA_CPP is the source tree.
cmake_minimum_required(VERSION 3.25)
project(orion_llama_cpp C CXX)

# Off by default in a tree that is part of another.
set(LLAMA_BUILD_COMMON ON)
set(LLAMA_BUILD_TOOLS ON)
set(LLAMA_BUILD_SERVER ON)
add_subdirectory(${LLAMA_CPP} llama.cpp EXCLUDE_FROM_ALL)

# The time goes to headers: 150 files of model families include the same ones. Twelve files are compiled as one.
set(unity llama llama-common mtmd server-context llama-server-impl)
set_target_properties(${unity} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 12)

# These define the same names as their neighbours.
file(GLOB mtmd_own ${LLAMA_CPP}/tools/mtmd/*.cpp)
set_source_files_properties(
  ${LLAMA_CPP}/src/models/gemma4.cpp TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
set_source_files_properties(
  ${LLAMA_CPP}/common/json.cpp ${LLAMA_CPP}/common/chat.cpp
  TARGET_DIRECTORY llama-common PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
set_source_files_properties(${mtmd_own} TARGET_DIRECTORY mtmd PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)

# Nothing outside ggml is hot: what computes keeps -O3.
foreach(target IN LISTS unity ITEMS llama-server cpp-httplib llama-quantize)
  target_compile_options(${target} PRIVATE -O1)
endforeach()
