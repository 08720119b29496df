// The page's side of player.py: pieces of sound come as messages and are put one behind the other on a clock.
export default () => {
  const lines = new Set(); // one for every place at which the player is shown
  let text = "listening …";
  let speaker, end = 0, gaps = 0, seconds = 0;

  function say(what) {
    text = what;
    for (const line of lines) line.textContent = "♪ " + text;
  }

  function play(wave, rate) {
    speaker ??= new AudioContext({ sampleRate: rate }); // the sound's own rate, so that no seam is heard
    speaker.resume(); // pages that nobody has touched yet begin in silence
    const piece = speaker.createBuffer(1, wave.length, rate);
    piece.copyToChannel(wave, 0);
    const source = speaker.createBufferSource();
    source.buffer = piece;
    source.connect(speaker.destination);

    const soonest = speaker.currentTime + (end ? 0.005 : 0.05); // the first waits a little, lest the second come late
    if (end && soonest > end) gaps += 1; // it did come late
    const begin = Math.max(end, soonest);
    source.start(begin);
    end = begin + piece.duration;
    seconds += piece.duration;
    say(`speaking: ${seconds.toFixed(1)} s so far …`);
  }

  return {
    initialize({ model }) {
      model.on("msg:custom", ({ rate, over }, buffers) => {
        if (over) return say(`${seconds.toFixed(1)} s, heard while they were made; gaps: ${gaps}`);
        const { buffer, byteOffset, byteLength } = buffers[0];
        play(new Float32Array(buffer.slice(byteOffset, byteOffset + byteLength)), rate);
      });
      return () => speaker?.close();
    },

    render({ el }) {
      const line = document.createElement("div");
      line.className = "minomni-player";
      line.style.cssText = "font: 13px sans-serif; margin: 4px 0; padding: 4px 8px; border-left: 3px solid #e08214";
      lines.add(line);
      el.append(line);
      say(text);
      return () => lines.delete(line);
    },
  };
};
