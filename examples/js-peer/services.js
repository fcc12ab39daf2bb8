// What this peer offers: functions that get a reader at the service's first byte, and `accept` to call when it is there.
import { once } from 'node:events'
import net from 'node:net'

/** Everything comes back, then the end. */
export async function echo (reader, accept) {
  await accept()
  for (let data; (data = await reader.some()) !== null;) await reader.send(data)
  await reader.stream.close()
}

/** What listens at this address. The end of one direction passes through and leaves the other open. */
export function port (host, number) {
  return async (reader, accept) => {
    const socket = net.connect({ host, port: number, allowHalfOpen: true })
    await once(socket, 'connect')
    try {
      await accept()
      await Promise.all([toSocket(reader, socket), fromSocket(socket, reader)])
    } finally {
      socket.destroy()
    }
  }
}

async function toSocket (reader, socket) {
  for (let data; (data = await reader.some()) !== null;) {
    if (!socket.write(data)) await once(socket, 'drain')
  }
  socket.end()
}

async function fromSocket (socket, reader) {
  for await (const data of socket) await reader.send(data)
  await reader.stream.close()
}
