// The two ends of a tunnel by js-libp2p, for streams.py. JS_MODULES: the folder whose node_modules has it.
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'
import net from 'node:net'

const folder = process.env.JS_MODULES
const load = async (name) => import(pathToFileURL(createRequire(folder + '/').resolve(name)).href)
  .catch(async () => import(pathToFileURL(`${folder}/node_modules/${name}/dist/src/index.js`).href))
const { createLibp2p } = await load('libp2p')
const { tcp } = await load('@libp2p/tcp')
const { noise } = await load('@libp2p/noise')
const { yamux } = await load('@libp2p/yamux')
const { multiaddr } = await load('@multiformats/multiaddr')

const PROTOCOL = '/bench/tunnel/1'
const [role, argument] = process.argv.slice(2)
const node = await createLibp2p({
  addresses: { listen: role === 'far' ? ['/ip4/127.0.0.1/tcp/0'] : [] },
  transports: [tcp()], connectionEncrypters: [noise()], streamMuxers: [yamux()],
  connectionManager: { inboundConnectionThreshold: 1e6, maxIncomingPendingConnections: 1e6 }
})

function splice (stream, socket) {
  socket.setNoDelay(true)
  ;(async () => {
    for await (const data of socket.iterator({ destroyOnReturn: false })) {
      if (!stream.send(data)) await stream.onDrain()
    }
    await stream.close()
  })().catch(() => socket.destroy())
  ;(async () => {
    for await (const chunk of stream) {
      const data = chunk.subarray()
      if (!socket.write(data)) await new Promise((resolve) => socket.once('drain', resolve))
    }
    socket.end()
  })().catch(() => socket.destroy())
}

const limits = { maxInboundStreams: 1e6, maxOutboundStreams: 1e6 }
if (role === 'far') {
  await node.handle(PROTOCOL, (stream) => splice(stream, net.connect({ port: Number(argument), allowHalfOpen: true })), limits)
  console.log(node.getMultiaddrs()[0].toString())
} else {
  const connection = await node.dial(multiaddr(argument))
  const server = net.createServer({ allowHalfOpen: true, pauseOnConnect: true }, async (socket) => {
    splice(await connection.newStream(PROTOCOL, limits), socket)
  })
  server.listen(0, '127.0.0.1', () => console.log(server.address().port))
}
