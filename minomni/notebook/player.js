// The browser side of player.py: audio chunks arrive as messages and are scheduled back to back.
export default () => {
  const lines = new Set(); // one status line per view of the player
  let text = "listening …";
  let context; // the AudioContext, created by the first chunk
  let end = 0; // when the last scheduled chunk is over, on the context's clock in seconds
  let gaps = 0; // chunks that came too late
  let seconds = 0; // of audio so far

  function setStatus(status) {
    text = status;
    for (const line of lines) line.textContent = "♪ " + text;
  }

  function play(wave, rate) {
    context ??= new AudioContext({ sampleRate: rate }); // the audio's own rate: no resampling at chunk borders
    context.resume(); // browsers suspend audio until the user has touched the page
    const chunk = context.createBuffer(1, wave.length, rate);
    chunk.copyToChannel(wave, 0);
    const source = context.createBufferSource();
    source.buffer = chunk;
    source.connect(context.destination);

    // The first chunk waits a little, so that the second is not late.
    const delay = end ? 0.005 : 0.05;
    const earliest = context.currentTime + delay;
    if (end && earliest > end) gaps += 1;
    const begin = Math.max(end, earliest);
    source.start(begin);
    end = begin + chunk.duration;
    seconds += chunk.duration;
    setStatus(`speaking: ${seconds.toFixed(1)} s so far …`);
  }

  return {
    initialize({ model }) {
      model.on("msg:custom", ({ rate, over }, buffers) => {
        if (over) return setStatus(`${seconds.toFixed(1)} s, heard while they were made; gaps: ${gaps}`);
        const { buffer, byteOffset, byteLength } = buffers[0];
        play(new Float32Array(buffer.slice(byteOffset, byteOffset + byteLength)), rate);
      });
      return () => context?.close();
    },

    render({ el }) {
      const line = document.createElement("div");
      line.className = "minomni-player";
      line.style.cssText = "font: 13px sans-serif; margin: 4px 0; padding: 4px 8px; border-left: 3px solid #e08214";
      lines.add(line);
      el.append(line);
      setStatus(text);
      return () => lines.delete(line);
    },
  };
};
